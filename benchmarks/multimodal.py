"""Tiny multimodal models: their configs, images and sound in a prompt, and the model without a cache as the truth."""

import copy
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from attention_sinks import sink_generate
from attention_sinks.grids import rope_index_of

WINDOW_LENGTH, NUM_SINK_TOKENS = 16, 4

# The token ids of a prompt: text is below them.
START, END, IMAGE, VIDEO, AUDIO = 58, 59, 60, 61, 62
TEXT_IDS = 50
# What the default config of a type leaves out and a model cannot do without.
REALISTIC: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": IMAGE, "IMGIMGAZ": 52, "IMGIMGBZ": 53}},
    "emu3": {
        "vocabulary_map": {
            "<image>": IMAGE,
            "<|extra_200|>": END,
            "<|visual token 000000|>": 52,
            "<|visual token 000001|>": 53,
        }
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": START, "vision_end_token_id": END, "audio_start_token_id": 57},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": START, "vision_end_token_id": END, "audio_start_token_id": 57},
    "granite4_vision": {
        "deepstack_layer_map": [(-1, 0)],
        "spatial_target_layers": [0, 0, 0, 0],
        "downsample_rate": "4/8",
    },
}
# Sizes of an image or audio encoder, by their names. `None` is the width of the text model.
_NARROW: tuple[tuple[str, Any], ...] = (
    (r"(out_hidden_size|output_hidden_size|text_hidden_size|output_dim|projection_dim|out_dim)$", None),
    (r"(intermediate_size|ffn_dim|mlp_dim|mlp_hidden_size)$", 64),
    (r"(hidden_size|embed_dim|d_model|width|hidden_dim|^dim|model_dim)$", 64),
    (r"(^|_)(attention_)?heads$|^n_heads$", 4),
    (r"^head_dim$", 16),
    (r"^base_channels$", 32),
    (r"^num_res_blocks$", 1),
    (r"^num_filters$", 8),
    (r"vocab_size$|codebook_size$|^num_embeddings$", 64),
    (r"^(channel_multiplier|depths)$", 1),
)
_DEPTHS = ("num_hidden_layers", "num_layers", "num_blocks", "depth", "num_global_layers", "encoder_layers")


def with_text_config(config: Any, text: Any, is_narrow: bool) -> Any:
    """Return a copy of the config of a multimodal model with another text config, and with small towers.

    If `is_narrow`, towers are made narrow, else only shallow.
    """
    old = config.get_text_config(decoder=True)
    if old is config:
        config = text
    config = with_tokens(copy.deepcopy(config))
    for name, value in REALISTIC.get(config.model_type, {}).items():
        setattr(config, name, value)
    width = text.hidden_size if is_narrow else None
    if getattr(config, "mm_tokens_per_image", None) is not None:
        config.mm_tokens_per_image = 4
    inner = config.get_text_config(decoder=True)
    for name, part in list(vars(config).items()):
        if isinstance(part, int) and "projector" in name and re.search(r"(hidden_size|_dim)$", name) and is_narrow:
            setattr(config, name, 64)
        if not isinstance(part, PreTrainedConfig):
            continue
        if part is inner:
            setattr(config, name, text)
        elif old is not config and part.get_text_config(decoder=True) is inner:
            setattr(config, name, with_text_config(part, text, is_narrow))
        elif hasattr(part, "architecture"):
            # The encoder is that of another package: what it would make of an image is put in.
            tower = CLIPVisionConfig(image_size=32, patch_size=16)
            shrink_tower(tower, 64)
            for field, value in {**vars(part), "model_args": {"embed_dim": 64}}.items():
                if not hasattr(tower, field):
                    setattr(tower, field, value)
            vars(config)[name] = tower
        else:
            shrink_tower(part, width)
    return config


def with_tokens(config: Any) -> Any:
    """Set the ids of special tokens of a config to ids of the small vocabulary."""
    words = {"start": START, "boi": START, "end": END, "eoi": END}
    words |= {"video": VIDEO, "image": IMAGE, "audio": AUDIO, "speech": AUDIO}
    for name, value in list(vars(config).items()):
        token = next((token for word, token in words.items() if word in name), None if value is None else 0)
        if re.search(r"_token_(id|index)$|_(start|end|patch)_id$", name) and isinstance(value, int | None):
            setattr(config, name, token)
    return config


def shrink_tower(config: Any, text_width: int | None = None) -> None:
    """Make an image or audio encoder shallow, and narrow too if the width of the text model is given."""
    with_tokens(config)
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if text_width is not None and all(isinstance(size, int) and size > 0 for size in sizes):
        config.image_size = 4 * config.patch_size
    for name in _DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 1)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shrink_tower(value, text_width)
        elif text_width is not None and isinstance(value, int | list) and not isinstance(value, bool) and value:
            rule = next(((pattern, size) for pattern, size in _NARROW if re.search(pattern, name)), None)
            if rule is not None:
                size = text_width if rule[1] is None else rule[1]
                setattr(config, name, [size] * len(value) if isinstance(value, list) else size)
        if isinstance(value, list) and re.search(r"deepstack_visual_indexes|fullatt_block_indexes", name):
            setattr(config, name, [0])


@torch.no_grad()
def media_error(model: Any, kind: str) -> tuple[float | None, str]:
    """Return the largest error of an answer to a prompt with an image or with sound, and how its features were made.

    Each step past the prompt must be the decoder without a cache on the embeddings of the kept tokens, at contiguous
    positions. The model must have one layer that mixes tokens. Return None, and "not fed" if it takes another prompt.
    """
    for inputs, made in _prompts(model, kind):
        decoder = model.get_decoder()
        with _Recorder(decoder) as recorder:
            try:
                with torch.random.fork_rng():
                    model.generate(**inputs, max_new_tokens=1, do_sample=False)
            except Exception:  # inputs of another form
                continue
        embeddings = recorder.embeddings[0]
        # The features are in the place of the special tokens, which were all alike.
        if embeddings.shape[1] == inputs["input_ids"].shape[1] and not torch.equal(embeddings[:, 6], embeddings[:, 7]):
            return _answer_error(model, decoder, inputs), made
    names = "pixel_values" if kind == "image" else "input_features|input_values|audio"
    return None, "not fed" if re.search(names, " ".join(inspect.signature(model.forward).parameters)) else ""


def _answer_error(model: Any, decoder: Any, inputs: dict[str, Any]) -> float:
    with _Recorder(decoder) as recorder:
        output: Any = sink_generate(
            model,
            **inputs,
            window_length=WINDOW_LENGTH,
            num_sink_tokens=NUM_SINK_TOKENS,
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            suppress_tokens=list(range(TEXT_IDS, 64)),
        )
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    positions = _positions(model, sequences, inputs)
    embeddings = torch.cat(recorder.embeddings, dim=1)
    others = {name: torch.cat(parts, dim=1) for name, parts in recorder.others.items()}
    worst, length = 0.0, inputs["input_ids"].shape[1]
    for i, state in enumerate(recorder.states[1:], length + 1):
        kept = [*range(NUM_SINK_TOKENS), *range(max(i - WINDOW_LENGTH, 0) + NUM_SINK_TOKENS, i)]
        arguments = {name: each[:, kept] for name, each in others.items()}
        if positions is not None:
            arguments["position_ids"] = _contiguous(positions[:, :, kept])
        truth = decoder(inputs_embeds=embeddings[:, kept], use_cache=False, **arguments)[0][:, -1]
        error = float((state - truth).abs().max() / truth.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst if len(recorder.states) == 24 else float("inf")


def _contiguous(positions: Tensor) -> Tensor:
    """Return the positions `[axes, 1, length]` of kept tokens with those that are no sinks moved next to the sinks."""
    moved = positions.clone()
    end = positions[:, :, :NUM_SINK_TOKENS].max() + 1
    moved[:, :, NUM_SINK_TOKENS:] -= positions[:, :, NUM_SINK_TOKENS:].min() - end
    return moved


def _positions(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """Return the positions of a whole text, by the model's own `get_rope_index`, or None if it counts tokens."""
    rope_index = rope_index_of(model)
    if rope_index is None:
        return None
    taken = inspect.signature(rope_index).parameters
    given = {name: value for name, value in inputs.items() if name in taken and name != "input_ids"}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape:
            given[name] = pad(value, (0, input_ids.shape[1] - value.shape[1]), value=int(name == "attention_mask"))
    return torch.as_tensor(rope_index(input_ids=input_ids, **given)[0])


class _Recorder:
    """What a decoder is given and returns, in all passes inside."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.embeddings: list[Tensor] = []
        self.others: dict[str, list[Tensor]] = {}
        self.states: list[Tensor] = []

    def __enter__(self) -> Self:
        def record(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            embeddings = kwargs.get("inputs_embeds")
            embeddings = self.first if embeddings is None else embeddings
            self.embeddings.append(embeddings)
            self.states.append(output[0][:, -1])
            for name, value in kwargs.items():  # embeddings that are made outside of the decoder, of each layer
                is_other = name != "inputs_embeds" and isinstance(value, Tensor) and value.is_floating_point()
                if is_other and value.shape[:2] == embeddings.shape[:2]:
                    self.others.setdefault(name, []).append(value)

        def record_first(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.first = args[0] if args else kwargs["hidden_states"]

        self.hooks = [self.decoder.register_forward_hook(record, with_kwargs=True)]
        for layer in getattr(self.decoder, "layers", [])[:1]:
            self.hooks.append(layer.register_forward_pre_hook(record_first, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _prompts(model: Any, kind: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield prompts with an image or with sound in forms that a model may take, and how their features are made."""
    names = inspect.signature(model.forward).parameters
    forms = _image_forms(model, names) if kind == "image" else _sound_forms(model, names)
    if not forms:
        return
    owners = [m for m in model.modules() if hasattr(m, f"get_{'image' if kind == 'image' else 'audio'}_features")]
    method = f"get_{'image' if kind == 'image' else 'audio'}_features"
    token = IMAGE if kind == "image" else AUDIO
    for given in forms:  # by the encoder of the model
        for owner in owners[-1:]:
            try:
                taken = inspect.signature(getattr(owner, method)).parameters
                arguments = {name: value for name, value in given.items() if name in taken}
                length = _length(getattr(owner, method)(**arguments, return_dict=True))
            except Exception:  # pixels or sound of another form
                continue
            if 0 < length < 2000:
                yield _prompt(names, token, length, given), "its encoder"
    if not owners:
        if "feature_attention_mask" in names:  # Qwen2-Audio puts its features in by itself: 40 frames make 10 tokens
            forms[0]["feature_attention_mask"][:, 40:] = 0
            yield _prompt(names, token, 10, forms[0]), "its encoder"
        return
    width = model.get_input_embeddings().weight.shape[-1]
    generator = torch.Generator().manual_seed(token)
    given = forms[-1]
    length = 6
    features = torch.randn(length, width, generator=generator)
    pooled: Any
    for pooled in ((features,), features[None], features):
        for owner in owners:
            output = BaseModelOutputWithPooling(last_hidden_state=features[None], pooler_output=pooled)
            output["deepstack_features"] = []
            output["attention_mask"] = torch.ones(1, length, dtype=torch.bool)
            output["audio_mel_mask"] = torch.zeros(1, length, dtype=torch.bool)
            output.router_logits = None
            output.visual_indicator_features = torch.zeros(5, width)
            setattr(owner, method, _constant(getattr(owner, method), output))
        yield _prompt(names, token, length, given), "features put in"
        unmasked = {name: value for name, value in given.items() if "mask" not in name}
        if len(unmasked) < len(given):
            yield _prompt(names, token, length, unmasked), "features put in"


def _constant(method: Any, output: Any) -> Any:
    @functools.wraps(method)
    def constant(*args: Any, **kwargs: Any) -> Any:
        return output

    return constant


def _length(output: Any) -> int:
    """Return the number of tokens of the features of an encoder."""
    features = output.pooler_output
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def _prompt(names: Any, token: int, length: int, given: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randint(1, TEXT_IDS, (2, 5), generator=generator).tolist()
    input_ids = torch.tensor([[*before, START, *[token] * length, END, *after]])
    types = (input_ids == token).long()
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **given}
    return inputs | {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in names}


def _image_forms(model: Any, names: Any) -> list[dict[str, Any]]:
    """Return pixels of one image in forms that a model may take."""
    config = getattr(model.config, "vision_config", None)
    generator = torch.Generator().manual_seed(2)
    size, patch = (getattr(config, name, 0) for name in ("image_size", "patch_size"))
    size, patch = (
        each if isinstance(each, int) and each > 0 else default for each, default in ((size, 32), (patch, 16))
    )
    square = torch.randn(1, 3, size, size, generator=generator)
    if "image_grid_thw" in names:
        frames, merge = _positive(config, "temporal_patch_size", 1), _positive(config, "spatial_merge_size", 2)
        rows = torch.randn(6 * merge * merge, 3 * frames * patch * patch, generator=generator)
        grid = torch.tensor([[1, 2 * merge, 3 * merge]])
        patches = rows.view(len(rows), 3, frames, patch, patch)[:, :, 0]
        return [{"pixel_values": pixels, "image_grid_thw": grid} for pixels in (rows, patches)]
    if "pixel_values" not in names:
        return []
    sizes = {name: torch.tensor([[size, size]]) for name in ("image_sizes",) if name in names}
    # In patches: six tokens of the features that are put in.
    sizes |= {name: torch.tensor([[8, 12]]) for name in ("target_sizes",) if name in names}
    several = square.expand(2, -1, -1, -1)[None]
    forms: list[dict[str, Any]] = [{"pixel_values": square}, {"pixel_values": square[None]}, {"pixel_values": several}]
    return forms + [{**form, **sizes} for form in forms if sizes]


def _positive(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, default)
    return value if isinstance(value, int) and value > 0 else default


def _sound_forms(model: Any, names: Any) -> list[dict[str, Any]]:
    """Return sound in forms that a model may take."""
    generator = torch.Generator().manual_seed(2)
    config = getattr(model.config, "audio_config", None)
    bins = max(_positive(config, name, 0) for name in ("num_mel_bins", "n_mel_bins", "input_feat_size")) or 80
    forms: list[dict[str, Any]] = []
    if "input_features" in names:
        for frames in (3000, 64):
            form = {"input_features": torch.randn(1, bins, frames, generator=generator)}
            for mask in ("input_features_mask", "feature_attention_mask"):
                if mask in names:
                    form[mask] = torch.ones(1, frames, dtype=torch.long)
            forms += [form, {**form, "input_features": form["input_features"].transpose(1, 2)}]
    if "input_values" in names:
        form = {"input_values": torch.randn(1, 1, 9600, generator=generator)}
        if "padding_mask" in names:
            form["padding_mask"] = torch.ones(1, 9600, dtype=torch.long)
        forms += [form, {**form, "input_values": form["input_values"][0]}]
    return forms
