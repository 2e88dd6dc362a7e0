"""A page in the browser: ask about a picture, by two methods at budgets of your choice, and see what each kept.

Nothing here is imported by the rest of the library; the page itself needs the extra `studio` (Gradio).
"""
