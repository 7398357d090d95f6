"""Watch a video that does not end: its frames go into one session, which is asked about them now and then.

Without arguments it loads Qwen2-VL-2B-Instruct from the Hub, whose processor needs torchvision. With `--tiny` a model
with random weights answers nonsense, without a download.
"""

import sys
import time

from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from attention_sinks import SinkSession
from attention_sinks.load import tiny_vision_model

NAME = "Qwen/Qwen2-VL-2B-Instruct"
COLORS = ("red", "green", "blue", "yellow")


def frame(number: int) -> Image.Image:
    """Draw a ball that crosses the picture, and takes another color each time."""
    picture = Image.new("RGB", (224, 224), "white")
    x = number * 20 % 224
    ImageDraw.Draw(picture).ellipse((x, 82, x + 60, 142), fill=COLORS[number * 20 // 224 % len(COLORS)])
    return picture


if "--tiny" in sys.argv:
    (model, processor), window_length = tiny_vision_model(), 256
else:
    model = AutoModelForImageTextToText.from_pretrained(NAME, dtype="auto", device_map="auto")
    processor, window_length = AutoProcessor.from_pretrained(NAME), 1024

session = SinkSession(model, processor, window_length, system="You watch a camera. Answer in one sentence.")
start = time.perf_counter()
for number in range(1, 61):
    session.feed(images=[frame(number)])
    if number % 20 == 0:
        cost = 1000 * (time.perf_counter() - start) / 20
        print(f"frame {number}: {session.tokens_seen} tokens seen, {session.kept_length} kept, {cost:.0f} ms per frame")
        print("".join(session.chat("What is happening now?", max_new_tokens=24)))
        start = time.perf_counter()
