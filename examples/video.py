"""A video: one budget for all its frames, or one for each; the model is a Video-LLaVA with the demo model's weights.

python examples/video.py
"""

from collections import Counter

import torch
from PIL import Image, ImageChops
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

import foveate
from foveate import demo

FRAMES, QUESTION = 4, "what word is written?"


def main() -> None:
    """Print the answer with two kinds of budget, and how many tokens of each frame stayed."""
    small, processor = demo.load()
    zoo = processor.tokenizer.convert_tokens_to_ids("zoo")  # a word that the question has no need of
    parts = {"vision_config": small.config.vision_config, "text_config": small.config.text_config}
    model = VideoLlavaForConditionalGeneration(VideoLlavaConfig(**parts, video_token_index=zoo)).eval()
    weights = {name.replace("vision_tower", "video_tower"): value for name, value in small.state_dict().items()}
    model.load_state_dict(weights, strict=False)  # its other tower, for images, is not used
    frames = [ImageChops.offset(Image.open(demo.PICTURE), 12 * i, 0) for i in range(FRAMES)]  # the camera turns
    pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"][None]
    before, after = (processor.tokenizer(text).input_ids for text in ("USER:", f"\n{QUESTION} ASSISTANT:"))
    ids = torch.tensor([before + [zoo] * FRAMES * (576 + 1) + after])  # a CLS row goes with each frame
    for method in (foveate.ToDRE(keep=128, exit=None), foveate.ToDRE(keep=32, exit=None, per="frame")):
        with foveate.compress(model, method) as handle:
            output = model.generate(input_ids=ids, pixel_values_videos=pixels, max_new_tokens=4, do_sample=False)
        by_frame = Counter(token // 576 for token in handle.report.images[0].kept)
        answer = processor.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        print(foveate.to_spec(method), answer, handle.report, sep="\n")
        print("  tokens by frame:", *(by_frame[i] for i in range(FRAMES)))


if __name__ == "__main__":
    main()
