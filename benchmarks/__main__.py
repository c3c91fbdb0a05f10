"""python -m benchmarks COMMAND … , each with its own --help; docs/benchmarks.md holds what was measured."""

from __future__ import annotations

import sys
from importlib import import_module

# Name -> the module whose `main` takes the rest of the line, and what it does.
COMMANDS = {
    "all": ("everything", "every measurement below that ends by itself, as one report in Markdown and JSON"),
    "networks": ("networks", "the networks beside diffusers' and dalle2-pytorch's: forward, training step, sampling"),
    "batches": ("batches", "eight pictures drawn together beside one, stage by stage, and the memory each takes"),
    "training-memory": ("training_memory", "what a training step adds in memory, beside both peers'"),
    "cold-start": ("cold_start", "`unclip sample` as a user meets it, a new process each run"),
    "data-loading": ("data_loading", "images a second from tars, beside what a training step consumes"),
    "precompute": ("precompute", "embedding a data set, beside the CLIP alone"),
    "embeddings": ("embeddings", "a prior's step from stored embeddings, beside the CLIP in the loop"),
    "training-loop": ("training_loop", "the training loop's throughput beside a bare PyTorch loop"),
    "karlo": ("karlo", "the pipeline of a small Karlo beside diffusers 0.37.1 in an environment of its own"),
    "conversion": ("conversion", "the peak memory of converting a Karlo of either layout, beside the weights' size"),
    "kills": ("kills", "a run that is killed over and over, beside one that is left alone"),
    "digits": ("digits", "a whole system trained on handwritten digits, judged, beside dalle2-pytorch's"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join([__doc__, "", *(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items())])


def main(arguments: list[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        sys.exit(f"unknown benchmark {name!r}; expected one of these:\n{usage()}")
    import_module(f"benchmarks.{COMMANDS[name][0]}").main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
