"""All that `transformers` may call on a cache or on a layer is implemented, or inherited by decision."""

import inspect
from typing import Any

import pytest
import transformers
from transformers import cache_utils

from attention_sinks import SinkCache

from ..support.inside import HybridSinkLayer, IndexedSinkLayer, SinkLayer
from ..support.programs import ROOT
from ..support.states import CONFIG

# The methods that our layers inherit by decision.
OF_A_LAYER = {"is_compileable", "offload", "prefetch", "supports_early_init"}


# A class of `transformers`, our class for it, and the methods that our class inherits or does without by decision.
INTERFACES: list[tuple[str, type, set[str]]] = [
    (
        "Cache",
        SinkCache,
        {
            "activate_past_recording", "batch_size", "early_initialization", "get_recurrent_state", "get_seq_length",
            "has_previous_state", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_recording_past",
            "is_sliding", "offload",
        },
    ),
    ("CacheLayerMixin", SinkLayer, OF_A_LAYER),
    ("DynamicLayer", SinkLayer, OF_A_LAYER),
    ("DynamicSlidingWindowLayer", SinkLayer, OF_A_LAYER),
    # The second ring initializes itself.
    ("DynamicIndexedLayer", IndexedSinkLayer, OF_A_LAYER | {"lazy_initialization_indexer"}),
    *(
        (name, HybridSinkLayer, OF_A_LAYER | {"update_conv_state", "update_recurrent_state"})
        for name in ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")
    ),
]  # fmt: skip


OF_EARLIER_VERSIONS = {"max_batch_size", "max_cache_len"}


def inherited(interface: type, ours: type) -> set[str]:
    """The public names of `interface` that no class of this library defines for `ours`."""
    classes = [base for base in ours.__mro__ if base.__module__.startswith("attention_sinks.")]
    names = {name for name, _ in inspect.getmembers(interface) if not name.startswith("_")}
    return {name for name in names if not any(name in vars(base) for base in classes)}


@pytest.mark.parametrize(("name", "ours", "known"), INTERFACES, ids=[name for name, *_ in INTERFACES])
def test_every_method_of_the_interface_is_implemented_or_inherited_by_decision(
    name: str, ours: type, known: set[str]
) -> None:
    """A new public name in `transformers` needs a decision."""
    interface = getattr(cache_utils, name, None)
    if interface is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    found = inherited(interface, ours)
    assert found - known <= OF_EARLIER_VERSIONS, "implement them, or decide to inherit them"
    if f"transformers=={transformers.__version__}\n" in (ROOT / "constraints.txt").read_text():
        assert found == known, "no longer there, or ours by now"
    later = type("Later", (interface,), {"method": lambda self: None, "number": property(lambda self: 0)})
    assert inherited(later, ours) - found == {"method", "number"}


def unknown_arguments(theirs: Any, ours: Any) -> set[str]:
    """The arguments of a method of `transformers` that our method does not take by name."""
    takes = inspect.signature(ours).parameters
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return set()
    named = {name for name, each in inspect.signature(theirs).parameters.items() if each.kind is not each.VAR_KEYWORD}
    return named - takes.keys() - {"args"}


@pytest.mark.parametrize(("name", "ours", "known"), INTERFACES, ids=[name for name, *_ in INTERFACES])
def test_every_method_takes_the_arguments_of_transformers_by_name(name: str, ours: type, known: set[str]) -> None:
    if f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        pytest.skip("early versions have other names, and give arguments by their place")
    methods = inspect.getmembers(getattr(cache_utils, name), inspect.isfunction)
    assert {
        method: missing
        for method, theirs in methods
        if not method.startswith("_")
        and hasattr(ours, method)
        and (missing := unknown_arguments(theirs, getattr(ours, method)))
    } == {}
    assert unknown_arguments(lambda self, states, later: None, lambda self, states: None) == {"later"}


def test_both_names_of_the_maximum_length_are_answered() -> None:
    assert SinkCache(CONFIG).get_max_length() == SinkCache(CONFIG).get_max_cache_shape() == 256
    assert not SinkCache(CONFIG).is_compileable
