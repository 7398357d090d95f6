"""A session with a processor: images, videos and text in one stream, exact and of bounded size."""

import gc
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from attention_sinks import SinkSession

from ..support.grids import GRID_MODELS, STARTS_AT_TEXT, Recorder, coordinates, logits_of_window
from ..support.inside import ids_of
from ..support.processors import (
    frame,
    gemma_model,
    gemma_processor,
    grid_chat_model,
    grid_processor,
    llava_model,
    llava_processor,
    sound,
    sound_model,
    sound_processor,
)
from ..support.tokenizer import END, Answer, byte_tokenizer, chat_model

W = 40
TOLERANCE = 1e-5


class Logits(LogitsProcessor):
    """Remembers the logits of each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(scores[0].clone())
        return scores


class Watch:
    """What the model of a session reads inside: the tokens, their embeddings, and the grids of images and videos."""

    def __init__(self, session: SinkSession) -> None:
        self.session, self.model, self.ids = session, session.model, list[int]()

    def __enter__(self) -> Self:
        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.ids += kwargs["input_ids"][0].tolist()

        self.recorder = Recorder(self.model)
        self.recorder.__enter__()
        self._hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self.recorder.__exit__()

    def truth(self, length: int, window_length: int, num_sinks: int) -> Tensor:
        """The logits after `length` tokens, by the model without a cache on the kept tokens."""
        embeddings = torch.cat(self.recorder.embeddings, dim=1)[:, :length]
        if hasattr(self.model.model, "get_rope_index"):
            given = {name: torch.cat(grids) for name, grids in self.session.processor.noted.items() if grids}
            positions = coordinates(self.model, torch.tensor([self.ids]), given)[:, :, :length]
            return logits_of_window(self.model, embeddings, positions, window_length, num_sinks)
        kept = [*range(length)]
        if length > window_length:
            kept = [*range(num_sinks), *range(length - window_length + num_sinks, length)]
        with torch.no_grad():
            output = self.model.model.language_model(inputs_embeds=embeddings[:, kept], use_cache=False)
            logits: Tensor = self.model.lm_head(output.last_hidden_state[0, -1])
        return logits

    def check(self, length: int = 12, **message: Any) -> None:
        """Let a session answer, and check each step of the answer."""
        logits, session = Logits(), self.session
        silent = [*self.model.generation_config.suppress_tokens, END]
        options: dict[str, Any] = {
            "do_sample": False,
            "suppress_tokens": silent,
            "max_new_tokens": length,
            "logits_processor": [logits],
        }
        "".join(session.chat(**message, **options) if message else session.generate(**options))
        first, read = len(self.ids) - length + 1, len(self.recorder.embeddings)
        for i, step in enumerate(logits.steps):
            truth = self.truth(first + i, session.cache.window_length, session.cache.num_sink_tokens)
            del self.recorder.embeddings[read:]  # of the truth
            finite = step > -1e30  # suppressed tokens
            assert (step - truth)[finite].abs().max() <= TOLERANCE * truth.abs().max()


KINDS: dict[str, Any] = {
    **{name: (partial(grid_chat_model, name), partial(grid_processor, name)) for name in GRID_MODELS},
    "llava": (llava_model, llava_processor),
    "gemma3": (gemma_model, gemma_processor),
}

# Whose positions of an image do not depend on what stands before it.
EXACT = [kind for kind in KINDS if kind in STARTS_AT_TEXT or kind not in GRID_MODELS]


def new(kind: str, window_length: int = W, **options: Any) -> SinkSession:
    model, processor = (make() for make in KINDS[kind])
    return SinkSession(model, processor, window_length, **options)


def say(session: SinkSession, text: str) -> dict[str, Any]:
    return {"logits_processor": [Answer(session.tokenizer, text)], "suppress_tokens": None}


@pytest.mark.parametrize("system", [None, "Speak like a pirate."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_reads_what_the_processor_makes_of_the_whole_conversation(kind: str, system: str | None) -> None:
    session, image, conversation, images, read = new(kind, 1000, system=system), {"type": "image"}, list[Any](), [], []
    if system is not None:
        conversation.append({"role": "system", "content": [{"type": "text", "text": system}]})
    turns: list[tuple[list[int], list[int], str]] = [
        ([], [0], "What is this?"), ([1, 2], [], "And these?"), ([], [], "Thank you"), ([3], [4, 5], "More")
    ]  # fmt: skip
    for fed, asked, message in turns:
        count = 0
        for number in fed:
            count += session.feed(images=[frame(number, 16, 24)])
        assert (count > 0) == bool(fed)
        "".join(session.chat(message, images=[frame(number, 16, 24) for number in asked], **say(session, "Ahoy.")))
        images += [frame(number, 16, 24) for number in (*fed, *asked)]
        content = [*([image] * len((*fed, *asked))), {"type": "text", "text": message}]
        conversation.append({"role": "user", "content": content})
        text = session.processor.apply_chat_template(conversation, add_generation_prompt=True)
        expected = session.processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False)
        said = session.tokenizer("Ahoy.")["input_ids"]
        assert ids_of(session) == [*expected["input_ids"][0].tolist(), *said, END]
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": "Ahoy."}]})
        read.append(len(ids_of(session)))
    assert all(a < b for a, b in pairwise(read))


@pytest.mark.parametrize("kind", EXACT)
def test_each_step_of_a_stream_with_images_is_the_model_without_a_cache_on_the_kept_tokens(kind: str) -> None:
    session = new(kind)
    with Watch(session) as watch:
        watch.check(message="What is this?", images=[frame(0)])
        session.feed(images=[frame(1), frame(2, 8, 24)])
        session.feed(images=[frame(3)])
        session.feed("They are in Paris. " * 4)
        watch.check(message="What is it now?", images=[frame(4)])
        watch.check(message="And then?")
        for number in range(5, 9):
            session.feed(images=[frame(number)])
        if session.tokenizer.decode(ids_of(session)[-1:]) != "<image>":
            watch.check()


def test_videos_stand_in_the_stream_as_images_do() -> None:
    session = new("qwen2_vl")
    with Watch(session) as watch:
        session.feed("Look at this.")
        session.feed(videos=[[frame(0), frame(1), frame(2), frame(3)]])
        watch.check(message="What is this?", images=[frame(4)], videos=[[frame(5), frame(6)]])
        watch.check(message="And this?", videos=[torch.tensor(frame(7))[None].repeat(2, 1, 1, 1)])


def test_sound_stands_in_the_stream_as_images_do() -> None:
    session = SinkSession(sound_model(), sound_processor(), W)
    for number in range(8):
        assert session.feed(audio=[sound(number)]) == 14
    "".join(session.chat("What is this?", audio=[torch.tensor(sound(8))], **say(session, "Ahoy.")))
    assert session.kept_length == W
    session.reset()
    session.feed(audio=[sound(0)])
    "".join(session.chat("What is this?", audio=[sound(1)], max_new_tokens=1))
    parts = [{"type": "audio"}, {"type": "audio"}, {"type": "text", "text": "What is this?"}]
    text = session.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    both = [sound(0), sound(1)]
    expected = session.processor(text=[text], audio=both, sampling_rate=16_000, return_tensors="pt")
    assert ids_of(session)[:-1] == expected["input_ids"][0].tolist()


def test_below_the_window_an_answer_is_that_to_the_whole_conversation() -> None:
    """Of Gemma 3, whose image tokens see those that follow them."""
    model, processor, logits = gemma_model(2), gemma_processor(), Logits()
    session = SinkSession(model, processor, 1000)
    "".join(session.chat("What is this?", images=[frame(0)], **say(session, "Ahoy.")))
    session.feed(images=[frame(1)])
    "".join(session.chat("And?", images=[frame(2)], max_new_tokens=1, logits_processor=[logits]))
    ids, images = torch.tensor([ids_of(session)[:-1]]), [frame(number) for number in range(3)]
    pixels = processor(text=["<begin>" * 3], images=[images], return_tensors="pt")["pixel_values"]
    types = (ids == model.config.image_token_index).long()
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits[0, -1]
    finite = logits.steps[0] > -1e30
    assert (logits.steps[0] - expected)[finite].abs().max() <= TOLERANCE * expected.abs().max()


def held(session: SinkSession) -> list[tuple[int, ...]]:
    """The shapes of all tensors that are alive, but for weights and what compiled code knows of."""
    gc.collect()
    weights = {id(each) for each in (*session.model.parameters(), *session.model.buffers())}
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and id(each) not in weights]
    return sorted(tuple(each.shape) for each in tensors)


def stream(num_frames: int, samples: int) -> None:
    """Check that a stream of frames holds the same at all its times, and is exact at its end."""
    session = new("qwen2_5_vl", window_length := 64)
    with Watch(session) as watch:
        sizes = []
        for number in range(1, num_frames + 1):
            assert session.feed(images=[frame(number)]) == 6
            assert session.kept_length <= window_length
            if number % (num_frames // samples) == 0:
                watched = len(watch.recorder.embeddings) + len(session.processor.noted["image_grid_thw"])
                shapes = held(session)
                sizes.append((len(shapes) - watched, len(ids_of(session)) <= 3 * window_length, session.cache.num_rows))
                assert not any(len(shape) == 2 and shape[1] == 96 for shape in shapes), "pixels"
        assert len({*sizes[1:]}) == 1, sizes
        watch.check(message="Now?", images=[frame(0)])
    assert session.tokens_seen > 6 * num_frames


OF_FRAMES = pytest.mark.skipif("qwen2_5_vl" not in STARTS_AT_TEXT, reason="it moves images by the rate of frames")


@OF_FRAMES
def test_a_stream_of_frames_is_exact_and_does_not_grow() -> None:
    stream(60, samples=4)


@OF_FRAMES
@pytest.mark.slow
def test_a_stream_of_2000_frames_is_exact_and_does_not_grow() -> None:
    stream(2000, samples=20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_or_forked_stream_of_images_goes_on_as_it_would_have(kind: str, tmp_path: Path) -> None:
    session = new(kind, system="Be brief.")
    for number in range(12):
        session.feed(images=[frame(number)])
    session.save(tmp_path / "session")
    others = [session.fork(), SinkSession.load(tmp_path / "session", session.model, session.processor)]
    steps = []
    for each in (session, *others):
        logits = Logits()
        "".join(each.chat("And?", images=[frame(20)], max_new_tokens=5, do_sample=False, logits_processor=[logits]))
        each.feed(images=[frame(21)])
        steps.append((torch.stack(logits.steps), ids_of(each)))
    for other in steps[1:]:
        assert torch.equal(other[0], steps[0][0])
        assert other[1] == steps[0][1]


def state(session: SinkSession) -> Any:
    """What tells streams apart; a compacted one is the same."""
    return session.tokens_seen, session.kept_length, ids_of(session)[-12:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": frame(0)}, TypeError, r"`images` must be a list, got ndarray of the shape \[16, 16, 3\]: "),
        ({"images": [None]}, TypeError, "`images` must hold images of PIL, arrays or tensors, got NoneType"),
        ({"images": [frame(0)[0]]}, ValueError, r"`images` .* \[height, width, 3\].*, got \[16, 3\]"),
        ({"images": [frame(0)[..., :2]]}, ValueError, r"`images` .* got \[16, 16, 2\]"),
        ({"images": [frame(0)[:0]]}, ValueError, r"`images` .* got \[0, 16, 3\]"),
        ({"images": [frame(0)[None]]}, ValueError, r"`images` .* got \[1, 16, 16, 3\]"),
        ({"images": [frame(0, 4, 900)]}, ValueError, "`images` must be what Qwen2_5_VLProcessor can process: .*ratio"),
        ({"videos": [frame(0)]}, ValueError, r"`videos` must hold videos of the shape .*, got \[16, 16, 3\]"),
        ({"videos": [[frame(0), frame(0, 8, 8)]]}, ValueError, "`videos` must hold frames of one shape"),
        ({"audio": [[0.0, 0.1]]}, TypeError, "`audio` must hold arrays or tensors, got list"),
        ({"audio": [torch.zeros(2, 100)]}, ValueError, r"`audio` .* one channel.* got \[2, 100\]"),
        ({"audio": [torch.zeros(100)]}, ValueError, "`audio` must be left out: Qwen2_5_VLProcessor takes none"),
        ({"images": [frame(0, 64, 64)]}, ValueError, "`images` must fit the window: they take 64 tokens, .*=40"),
        ({"images": [frame(i) for i in range(11)]}, ValueError, "take 44 tokens, and window_length=40. Give smaller"),
        ({"message": "See <|image_pad|>"}, ValueError, r"`\w+` must not hold '<\|image_pad\|>', .*`images=`"),
        ({"message": "<|video_pad|>", "images": [frame(0)]}, ValueError, "must not hold"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_what_cannot_be_read_is_refused_before_anything_is_read(
    arguments: dict[str, Any], error: type[Exception], message: str, begun: bool
) -> None:
    session, untouched = new("qwen2_5_vl"), new("qwen2_5_vl")
    for each in (session, untouched):
        if begun:
            each.feed(images=[frame(1)])
    before, media = state(session), {name: given for name, given in arguments.items() if name != "message"}
    said = arguments.get("message", "Hello")
    for call in (session.chat, session.feed):
        with pytest.raises(error, match=message):
            call(said, **media)
    assert state(session) == before
    with pytest.raises(TypeError, match="`pixel_values` must be left out: give images"):
        session.chat("Hello", pixel_values=torch.zeros(4, 96))
    answers = ["".join(each.chat("And?", images=[frame(2)], max_new_tokens=5)) for each in (session, untouched)]
    assert answers[0] == answers[1]


def test_images_without_a_processor_or_a_template_or_a_model_for_them_are_refused() -> None:
    model = chat_model()
    session = SinkSession(model, byte_tokenizer(), W)
    for call in (session.chat, session.feed):
        with pytest.raises(ValueError, match=r"`images` must be left out.*`SinkSession\(model, processor\)`"):
            call("Hello", images=[frame(0)])
    session = SinkSession(chat_model(vocab_size=263), grid_processor(), W)
    with pytest.raises(ValueError, match="`images` must be left out: this 'llama' model takes no `pixel_values`"):
        session.chat("Hello", images=[frame(0)])
    "".join(session.chat("Hello", images=[], max_new_tokens=3))  # text is for every model
    session = SinkSession(grid_chat_model(), grid_processor(template=None), W)
    for call in (session.chat, session.feed):
        with pytest.raises(ValueError, match=r"`processor` has no chat template. Set `processor.chat_template`"):
            call("Hello", images=[frame(0)])
    with pytest.raises(TypeError, match="`text` must be a string, got None"):
        session.feed(images=[])
    assert session.tokens_seen == 0
    session.feed("Once upon a time")
    "".join(session.generate(max_new_tokens=3))


def test_placeholders_without_images_are_refused_for_a_tokenizer_too() -> None:
    processor = grid_processor()
    processor.tokenizer.chat_template = byte_tokenizer().chat_template
    session = SinkSession(grid_chat_model(), processor.tokenizer, W)
    with pytest.raises(ValueError, match="`message` must not hold"):
        session.chat("What is <|image_pad|>?")
    "".join(session.chat("What is it?", max_new_tokens=3))
    with pytest.raises(ValueError, match="`system` must not hold"):
        SinkSession(session.model, processor, W, system="You see <|image_pad|>.")


@pytest.mark.parametrize("call", ["chat", "feed"])
def test_an_error_of_the_vision_tower_leaves_the_session_as_it_was(call: str) -> None:
    session, untouched = new("qwen2_5_vl"), new("qwen2_5_vl")
    for each in (session, untouched):
        "".join(each.chat("Hello", max_new_tokens=30))
        each.feed(images=[frame(1)])
    before = state(session)

    def fail(*_: object) -> None:
        raise ArithmeticError

    hook = session.model.model.visual.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        "".join(session.chat("And?", images=[frame(2)])) if call == "chat" else session.feed(images=[frame(2)])
    hook.remove()
    assert state(session) == before
    answers = ["".join(each.chat("And?", images=[frame(2)], max_new_tokens=5)) for each in (session, untouched)]
    assert answers[0] == answers[1]


def test_a_placeholder_that_the_model_wrote_is_text() -> None:
    session = new("qwen2_5_vl")
    image = session.model.config.image_token_id
    with Watch(session) as watch:
        for token, kind in ((image, {"images": [frame(3)]}), (image, {})):
            only = [each for each in range(len(session.tokenizer)) if each != token]
            "".join(session.chat("Hello", max_new_tokens=3, suppress_tokens=only, **kind))
            assert ids_of(session)[-1] == token
        watch.ids.clear()
    "".join(session.chat("And?", images=[frame(4)], max_new_tokens=5))
    "".join(session.generate(max_new_tokens=5))


def test_a_reader_that_leaves_ends_an_answer_to_images_as_any_other() -> None:
    session = new("qwen2_5_vl")
    answer = session.chat("Hello", images=[frame(0)], suppress_tokens=[END])
    answer.close()
    assert session.tokens_seen == 0
    answer = session.chat("Hello", images=[frame(0)], suppress_tokens=[END])
    next(answer)
    assert not any(len(shape) == 2 and shape[1] == 96 for shape in held(session)), "pixels"
    branch = session.fork()
    answer.close()
    for each in (session, branch):
        "".join(each.chat("And?", images=[frame(1)], max_new_tokens=5))


def test_what_the_model_generates_by_default_does_not_matter_to_images() -> None:
    session = new("llava")
    session.model.generation_config.update(stop_strings=["x"], guidance_scale=2.0)
    try:
        session.feed(images=[frame(0)])
    finally:
        session.model.generation_config.update(stop_strings=None, guidance_scale=None)
    "".join(session.chat("And?", max_new_tokens=3))


def test_a_long_text_before_images_is_read_in_chunks() -> None:
    session = new("qwen2_vl", system="Be kind. " * 12, keep_system_prompt=False)
    with Watch(session) as watch:
        watch.check(message="What is this?", images=[frame(0)])
        assert max(each.shape[1] for each in watch.recorder.embeddings) <= W


def test_after_images_a_stream_goes_on_where_the_template_has_text_behind_them() -> None:
    session = new("llava")
    session.processor.chat_template = session.processor.chat_template.replace("<image>\n", "<image>")
    session.feed(images=[frame(0)])
    with pytest.raises(ValueError, match="no text to continue after an image"):
        session.generate()
    "".join(session.chat("What is it?", max_new_tokens=3))
