"""python -m benchmarks networks …      the networks beside diffusers' and dalle2-pytorch's
python -m benchmarks cold-start …    `unclip sample` as a user meets it, a new process each run
python -m benchmarks data-loading …  images a second from tars, beside what a training step consumes
python -m benchmarks embeddings …    a prior's step from stored embeddings, beside the CLIP in the loop
python -m benchmarks training-loop … the training loop's throughput beside a bare PyTorch loop
python -m benchmarks kills …         a run that is killed over and over, beside one that is left alone

Each has its own --help; docs/benchmarks.md holds what was measured.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "networks":
        from benchmarks.networks import main as networks

        networks(rest)
    elif name == "cold-start":
        from benchmarks.cold_start import main as cold_start

        cold_start(rest)
    elif name == "data-loading":
        from benchmarks.data_loading import main as data_loading

        data_loading(rest)
    elif name == "embeddings":
        from benchmarks.embeddings import main as embeddings

        embeddings(rest)
    elif name == "training-loop":
        from benchmarks.training_loop import main as training_loop

        training_loop(rest)
    elif name == "kills":
        from benchmarks.kills import main as kills

        kills(rest)
    elif name in ("-h", "--help"):
        print(__doc__)
    else:
        sys.exit(f"unknown benchmark {name!r}; expected one of these:\n{__doc__}" if name else __doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
