"""An OpenAI-compatible server for one model: pictures come in, a question's budget with it, the savings go out.

Nothing here is imported by the rest of the library; it needs the extra `serve` (FastAPI, uvicorn, prometheus-client).
"""
