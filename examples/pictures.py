"""Talk about one picture after another, in a conversation that does not end; it is saved, and goes on from the file.

Without arguments it loads Qwen2-VL-2B-Instruct from the Hub, whose processor needs torchvision. With `--tiny` a model
with random weights answers nonsense, without a download.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from attention_sinks import SinkSession
from attention_sinks.load import tiny_vision_model

NAME = "Qwen/Qwen2-VL-2B-Instruct"


def picture(shape: str, color: str) -> Image.Image:
    """Draw a circle or a square."""
    image = Image.new("RGB", (224, 224), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((62, 62, 162, 162), fill=color)
    return image


if "--tiny" in sys.argv:
    (model, processor), window_length = tiny_vision_model(), 256
else:
    model = AutoModelForImageTextToText.from_pretrained(NAME, dtype="auto", device_map="auto")
    processor, window_length = AutoProcessor.from_pretrained(NAME), 1024

session = SinkSession(model, processor, window_length, system="Answer in one short sentence.")
for shape, color in (("circle", "red"), ("square", "blue"), ("circle", "green")):
    print(f"\n> a {color} {shape}: what is this?")
    print("".join(session.chat("What is this?", images=[picture(shape, color)], max_new_tokens=24)))
    print(f"  [{session.tokens_seen} tokens seen, {session.kept_length} kept]")

with tempfile.TemporaryDirectory() as folder:
    session.save(Path(folder, "pictures.safetensors"))
    session = SinkSession.load(Path(folder, "pictures.safetensors"), model, processor)
print("\n> two pictures: what do they have in common?")
both = [picture("circle", "black"), picture("square", "black")]
print("".join(session.chat("What do these have in common?", images=both, max_new_tokens=24)))
print(f"  [{session.tokens_seen} tokens seen, {session.kept_length} kept]")
