"""Run the benchmarks and write `docs/benchmarks.md`: python -m benchmarks [SECTION ...]

By default, run all sections that this machine supports. Other sections keep their recorded results. On a CUDA device,
the GPU sections use the shape of Llama 3 8B in bfloat16.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from . import construct, page, sections
from .measure import ALL_ROTATED, LLAMA3_8B, QWEN2_5_VL_3B, SMOLLM2_135M, TINY, Setting

ROOT = Path(__file__).resolve().parents[1]


def plans(quick: bool, environments: Path | None) -> dict[str, Callable[[], sections.Rows]]:
    """Return the measurement of each section that this machine supports."""
    if quick:  # check in seconds that everything runs
        tiny = Setting(TINY, (64,), rounds=3)
        return {
            "update": lambda: sections.update_cost(tiny),
            "decode": lambda: sections.decode(tiny),
            "video": lambda: sections.decode(tiny, ALL_ROTATED),
            "compiled": lambda: sections.compiled(tiny, None),
            "prefill": lambda: sections.prefill(tiny, (8,), None),
            "session": lambda: sections.session_cost(tiny, 8),
            "stream": lambda: sections.stream(tiny, (0, 100, 300), 64, environments),
            "memory": lambda: sections.memory(Setting(SMOLLM2_135M, (256,), rounds=1)),
            "construct": lambda: construct.construct(["Mistral 7B v0.1"], rounds=2),
        }
    update = Setting({}, (1024, 4096, 16384, 65536), rounds=20)
    decode = Setting(SMOLLM2_135M, (256, 1024, 4096, 16384), rounds=60)
    chosen: dict[str, Callable[[], sections.Rows]] = {
        "update": lambda: sections.update_cost(update) + sections.predecessor_updates(update, environments),
        "decode": lambda: sections.decode(decode),
        "video": lambda: sections.decode(Setting(QWEN2_5_VL_3B, (1024, 4096, 16384), rounds=40), ALL_ROTATED, 4),
        "compiled": lambda: sections.compiled(Setting(SMOLLM2_135M, (256, 1024, 4096), rounds=25), 6),
        "prefill": lambda: (
            sections.prefill(Setting(SMOLLM2_135M, (256, 1024, 4096), rounds=12), (16, 64, 256), 6)
            + sections.prefill(Setting({**LLAMA3_8B, "vocab_size": 1024}, (4096,), rounds=8), (64, 256), 1)
        ),
        "session": lambda: sections.session_cost(Setting(SMOLLM2_135M, (256,), rounds=10), 64),
        "stream": lambda: sections.stream(
            Setting(SMOLLM2_135M, (), rounds=9),
            (0, 500, 1000, 1500, 2000, 4000, 7000, 10000, 15000, 20000),
            sections.STREAM_WINDOW,
            environments,
        ),
        "memory": lambda: sections.memory(Setting(SMOLLM2_135M, (256, 1024, 4096), rounds=1)),
        "construct": lambda: construct.construct(list(construct.SHAPES), rounds=7),
    }
    if torch.cuda.is_available():
        cuda, half = torch.device("cuda"), torch.bfloat16
        large = Setting(LLAMA3_8B, (1024, 4096, 16384, 65536), 30, cuda, half)
        chosen |= {
            "gpu_update": lambda: sections.update_cost(Setting({}, (1024, 16384, 65536), 30, cuda, half)),
            "gpu_decode": lambda: sections.decode(large),
            "gpu_compiled": lambda: sections.compiled(large, None),
            "gpu_prefill": lambda: sections.prefill(Setting(LLAMA3_8B, (4096,), 10, cuda, half), (64, 256, 1024), None),
        }
    return chosen


def machine(section: str) -> str:
    """Return the name of the device that runs a section."""
    if section.startswith("gpu"):
        return torch.cuda.get_device_name()
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads"


def rounded(results: Any) -> Any:
    """Return results with all floats rounded to five significant digits."""
    if isinstance(results, dict):
        return {key: rounded(value) for key, value in results.items()}
    if isinstance(results, list):
        return [rounded(value) for value in results]
    return float(f"{results:.5g}") if isinstance(results, float) else results


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"sections to run: {', '.join(page.SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to check that everything runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page (default: docs)")
    parser.add_argument("--page", action="store_true", help="run nothing; write the page from the recorded results")
    parser.add_argument(
        "--no-predecessors", action="store_true", help="skip the predecessors, which need their own environments"
    )
    options = parser.parse_args(arguments)

    environments = None if options.no_predecessors else ROOT / ".benchmarks"
    chosen = plans(options.quick, environments)
    unknown = set(options.sections) - set(page.SECTIONS)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; the sections are {', '.join(page.SECTIONS)}")
    if options.page and options.sections:
        parser.error("`--page` runs no sections")
    folder = options.output / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.page and not torch.cuda.is_available():
        print("No CUDA device: the GPU sections keep their recorded results.")
    for name in [] if options.page else options.sections or chosen:
        if name not in chosen:
            parser.error(f"section {name!r} needs a CUDA device")
        print(f"{name} ...", flush=True)
        measured: dict[str, Any] = {
            "date": str(datetime.date.today()),
            "machine": machine(name),
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"attention-sinks {metadata.version('attention-sinks')}",
            "rows": chosen[name](),
        }
        (folder / f"{name}.json").write_text(json.dumps(rounded(measured)).replace("}, {", "},\n{") + "\n")
    page.write(options.output)
    print(f"wrote {options.output / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
