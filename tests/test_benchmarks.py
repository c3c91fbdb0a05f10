"""The benchmarks measure what they say: turns, ratios, operations, equal results; and sampling's prepared networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import contest, machine, peer_dalle2, stage_decoder, stage_prior, stage_upsampler
from benchmarks.__main__ import main
from benchmarks.contest import Contestant, compete, training_step
from benchmarks.shapes import SIZES, kept_timesteps
from benchmarks.timing import Spread, count_flops, in_turns, paired_ratio
from unclip.nn.prepared import PreparedNetwork

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


# ---- timing ------------------------------------------------------------------------------------------------


def test_contestants_take_turns_in_both_orders() -> None:
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2, CPU)  # type: ignore[misc]
    assert "".join(order) == "ba" + "ab" + "ba"  # warming up, then two rounds
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="0 runs"):
        in_turns({}, 0, CPU)


def test_ratios_are_of_paired_runs() -> None:
    # The machine slowed down tenfold in the third round, for both.
    assert paired_ratio([2.0, 4.0, 40.0], [1.0, 2.0, 20.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no figures"):
        Spread.of([])


def test_operations_of_a_product_and_a_convolution() -> None:
    result, flops = count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5))
    assert flops == 2 * 3 * 4 * 5 and result.shape == (3, 5)
    convolution = nn.Conv2d(2, 6, 3, padding=1)
    assert count_flops(lambda: convolution(torch.ones(1, 2, 8, 8)))[1] == 2 * 6 * 2 * 9 * 64


def test_a_training_step_is_one_step_of_adamw() -> None:
    network, x, target = nn.Linear(3, 2), torch.ones(4, 3), torch.zeros(4, 2)
    before = [parameter.clone() for parameter in network.parameters()]
    step = training_step(network, lambda net: net(x), target)
    losses = [float(step()) for _ in range(3)]
    assert losses[0] == pytest.approx(float((network(x) ** 2).mean().detach())) and losses[0] > losses[1] > losses[2]
    assert all(torch.equal(now, then) for now, then in zip(network.parameters(), before, strict=True))


# ---- contests ----------------------------------------------------------------------------------------------


def fixed(name: str, value: float) -> Contestant:
    works: dict[str, Any] = {"forward": lambda: torch.ones(2, 2) @ torch.full((2, 2), value)}
    return Contestant(name, 1, works, ("forward",))


def test_results_that_ought_to_be_equal_are_compared() -> None:
    rows, peak = compete("stage", [fixed("unclip, eager float32", 1.0), fixed("diffusers", 1.00001)], 2, CPU, edge=8)
    assert [(row.work, row.ours, row.peer) for row in rows] == [("forward", "unclip, eager float32", "diffusers")]
    assert rows[0].difference == pytest.approx(2e-5, rel=0.1) and peak > 0
    with pytest.raises(RuntimeError, match=r"stage, forward: unclip, eager float32 and diffusers differ by 2\.0e-01"):
        compete("stage", [fixed("unclip, eager float32", 1.0), fixed("diffusers", 1.1)], 1, CPU, edge=8)


@pytest.mark.parametrize(
    "contestants, shape",
    [
        (stage_prior.contestants, TINY.prior),
        (stage_decoder.contestants, TINY.decoder),
        (stage_upsampler.contestants, TINY.upsampler),
    ],
    ids=["prior", "decoder", "upsampler"],
)
def test_every_work_gives_what_diffusers_gives(contestants: Any, shape: Any) -> None:
    """Forward, the loss after one step of training, and a whole sampling, with the same weights and noise."""
    found = {one.name: one for one in contestants(shape, CPU)}
    theirs, ours = found["diffusers"], [one for name, one in found.items() if name.startswith("unclip")]
    assert len(ours) == 2 and all(one.parameters == theirs.parameters for one in ours)
    for work in contest.WORKS:
        for _ in range(2 if work == "training step" else 1):
            expected, results = theirs.works[work](), [one.works[work]() for one in ours]
        assert expected.isfinite().all() and float(expected.abs().max()) > 1e-2
        for one, result in zip(ours, results, strict=True):
            if "float32" in one.name or not machine.has_bfloat16(CPU):
                assert float((result - expected).abs().max()) <= contest.TOLERANCE, (work, one.name)


def test_without_diffusers_ours_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peer_diffusers.INSTALLED", False)
    monkeypatch.setattr(peer_dalle2, "INSTALLED", False)
    for contestants, shape, result in (
        (stage_prior.contestants, TINY.prior, (2, 32)),
        (stage_decoder.contestants, TINY.decoder, (2, 3, 16, 16)),
        (stage_upsampler.contestants, TINY.upsampler, (1, 3, 16, 16)),
    ):
        found = contestants(shape, CPU)  # type: ignore[operator]
        assert [one.name for one in found] == ["unclip, eager float32", "unclip, defaults"]
        assert found[0].works["forward"]().shape[0] == result[0]


@pytest.mark.skipif(not peer_dalle2.INSTALLED, reason="needs dalle2-pytorch, an optional peer")
def test_dalle2_pytorch_does_equal_work() -> None:
    """Parameters within 2 %, and as many passes through the network as ours, two a step with guidance."""
    for contestants, shape in ((stage_prior.contestants, TINY.prior), (stage_decoder.contestants, TINY.decoder)):
        found = {one.name: one for one in contestants(shape, CPU)}  # type: ignore[operator]
        ours, theirs = found["unclip, eager float32"], found["dalle2-pytorch"]
        assert abs(theirs.parameters / ours.parameters - 1) <= peer_dalle2.PARAMETERS_WITHIN
        once = count_flops(theirs.works["forward"])[1]
        assert count_flops(theirs.works["sampling"])[1] == 2 * shape.steps * once


def test_nearest_network_is_searched() -> None:
    def build(size: Any) -> nn.Module:
        return nn.Linear(size[0], size[1], bias=False)

    pairs = [(first, second) for first in (10, 20) for second in range(1, 101)]
    assert peer_dalle2._nearest(build, pairs, 1510) in ((20, 75), (20, 76))
    with pytest.raises(RuntimeError, match=r"no network .* has 9,000 parameters within 2%"):
        peer_dalle2._nearest(build, pairs, 9000)


def test_steps_are_evenly_spaced_below_the_noisiest() -> None:
    assert kept_timesteps(5) == [0, 200, 400, 600, 800]


# ---- command -----------------------------------------------------------------------------------------------


def test_report_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_dalle2, "INSTALLED", False)
    files = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    main(["networks", "--stage", "prior", "--size", "tiny", "--runs", "1", *files])
    body = json.loads((tmp_path / "r.json").read_text())
    assert {(row["stage"], row["work"], row["peer"]) for row in body["rows"]} == {
        ("prior", work, "diffusers") for work in contest.WORKS
    }
    assert body["machine"]["threads"] == torch.get_num_threads() and body["settings"]["peak"] > 0
    table = (tmp_path / "r.md").read_text()
    assert table.count("\n| prior |") == 6 and table in capsys.readouterr().out
    assert "dalle2-pytorch is not installed and was left out" in table


def test_wrong_options_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="unknown benchmark 'nonsense'"):
        main(["nonsense"])
    with pytest.raises(SystemExit):
        main(["networks", "--runs", "0"])
    assert "--runs is 0; expected 1 or more" in capsys.readouterr().err
    main(["--help"])
    assert "cold-start" in capsys.readouterr().out


# ---- what makes sampling fast ------------------------------------------------------------------------------


def test_conditioning_is_prepared_once_for_the_same_tensors() -> None:
    prepared: list[Tensor] = []

    def prepare(y: Tensor) -> Tensor:
        prepared.append(y)
        return 2 * y

    network = PreparedNetwork(prepare, lambda x, t, doubled: x + t + doubled)
    x, t, y = torch.ones(2), torch.zeros(2), torch.ones(2)
    assert network(x, t, y=y).tolist() == network(x, t, y=y).tolist() == [3, 3] and len(prepared) == 1
    assert network(x, t, y=torch.full((2,), 2.0)).tolist() == [5, 5] and len(prepared) == 2
    with torch.inference_mode():
        network(x, t, y=y)
        network(x, t, y=y)
    assert len(prepared) == 3
    # What inference mode has made is made anew where a gradient by x_t is wanted.
    point = torch.ones(2, requires_grad=True)
    network(point, t, y=y).sum().backward()  # type: ignore[no-untyped-call]
    assert point.grad is not None and point.grad.tolist() == [1, 1] and len(prepared) == 4


def test_prepared_halves_are_the_whole_network() -> None:
    """Prior and decoder, with some captions and embeddings dropped."""
    bench = stage_prior._Bench(TINY.prior, CPU)
    from prior import Prior

    prior = Prior(bench.config).eval()
    prior.load_state_dict(bench.state)
    drop = torch.tensor([True, False])
    given = {
        "text_embedding": bench.text.embedding,
        "text_tokens": bench.text.tokens,
        "text_mask": bench.text.mask,
        "drop_text": drop,
    }
    with torch.no_grad():
        whole = prior(bench.x, bench.t, **given)
        assert torch.allclose(prior.continued(bench.x, bench.t, prior.read(**given)), whole, atol=1e-5)
    from decoder import Decoder

    images = stage_decoder._Bench(TINY.decoder, CPU)
    decoder = Decoder(images.config).eval()
    decoder.load_state_dict(images.state)
    given = {
        "image_embedding": images.image,
        "text_embedding": images.text.embedding,
        "text_tokens": images.text.tokens,
        "text_mask": images.text.mask,
        "drop_embedding": ~drop,
        "drop_text": drop,
    }
    with torch.no_grad():
        whole = decoder(images.x, images.t, **given)
        halves = decoder.conditioned(images.x, images.t, decoder.read(**given))
    assert float(whole.std()) > 0.01 and torch.allclose(halves, whole, atol=1e-5)


# ---- one report --------------------------------------------------------------------------------------------


def test_every_command_of_the_report_is_one_and_has_a_main() -> None:
    from importlib import import_module

    from benchmarks.__main__ import COMMANDS, usage
    from benchmarks.everything import WORKS

    for name, (module, _) in COMMANDS.items():
        assert callable(import_module(f"benchmarks.{module}").main) and f"  {name} " in usage()
    for usual, tiny in WORKS.values():
        assert usual[0] == tiny[0] and usual[0] in COMMANDS


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import everything

    monkeypatch.setattr(peer_dalle2, "INSTALLED", False)
    works = {"wrong": (["nonsense"], ["nonsense"]), "help": (["networks", "--help"], ["networks", "--help"])}
    monkeypatch.setattr(everything, "WORKS", works)
    with pytest.raises(SystemExit) as ended:
        everything.main(["--out", str(tmp_path), "--only", "wrong", "help"])
    assert ended.value.code == 1
    body, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert body["absent"] == ["dalle2-pytorch"] and "left out: dalle2-pytorch" in text
    assert body["parts"]["help"]["error"] is None and "--stage" in body["parts"]["help"]["text"]
    assert "Failed: " in text and body["machine"]["versions"]["torch"] in text


def test_eight_pictures_beside_one(tiny_bundle: Path) -> None:
    from argparse import Namespace

    from benchmarks import batches

    options = Namespace(device="cpu", model=str(tiny_bundle), size=64, runs=2, without_memory=True)
    report = batches.measure(options)
    assert [row["stage"] for row in report["rows"]] == ["prior", "decoder"]
    for row in report["rows"]:
        assert row["flops"][8] == pytest.approx(8 * row["flops"][1], rel=0.35) and row["ratio"]["median"] > 0
    assert "| decoder |" in batches.to_text(report)
