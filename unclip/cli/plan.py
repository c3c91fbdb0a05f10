"""`unclip params` and `unclip plan`: how large a training run is, before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.errors import UsageError

_STAGE = Annotated[
    str | None,
    typer.Option(
        metavar="clip|prior|decoder|upsampler", help="The run's stage (default: its folder's name, or its keys)."
    ),
]
_JSON = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def params(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG…", help="Training YAMLs, of any stage.")],
    stage: _STAGE = None,
    json_output: _JSON = False,
) -> None:
    """Count the parameters of training recipes, beside the sizes that their publications state.

    Networks are built without memory, so that the largest takes seconds.
    """
    from unclip.planning import count_parameters, read_recipe

    told = []
    for path in configs:
        recipe = read_recipe(path, stage=stage)
        told.append({"config": str(path), "stage": recipe.stage, **count_parameters(recipe)})
    if json_output:
        print(json.dumps(told, indent=2))
        return
    rows = [["config", "part", "parameters", "stated", "difference"]]
    for counted in told:
        rows += _parameter_rows(counted)
    print(_table(rows))


def plan(
    config: Annotated[Path, typer.Argument(help="A training YAML, of any stage.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Such as train.batch_size=1024.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs, all together.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, a100-80, a100-40, l40s, rtx4090, v100, …")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of the GPUs' peak that is reached.")] = 0.4,
    zero: Annotated[
        int | None, typer.Option(help="ZeRO stage, 0 to 3 (default: the configuration's).", show_default=False)
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(help="Samples a GPU sees at once (default: the configuration's).", show_default=False),
    ] = None,
    reserve: Annotated[
        float, typer.Option(help="Share of a GPU's memory that is left for the CUDA context and fragmentation.")
    ] = 0.1,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(min=0, help="In any currency; adds the cost.", show_default=False)
    ] = None,
    bytes_per_image: Annotated[
        float | None, typer.Option(min=1, help="Stored bytes of an image with its caption.", show_default=False)
    ] = None,
    stage: _STAGE = None,
    json_output: _JSON = False,
) -> None:
    """Plan a training run: parameters, FLOPs, memory by ZeRO stage, days, GPU-hours, data.

    The step is run forward and backward on tensors without memory, with the training's own objective; no GPU is needed.
    """
    from unclip.planning import PlanOptions, find_gpu, read_recipe
    from unclip.planning import plan as make_plan

    options = PlanOptions(find_gpu(gpu), gpus, mfu, zero, micro_batch, reserve, price_per_gpu_hour, bytes_per_image)
    bad = [text for text in overrides or [] if "=" not in text]
    if bad:
        raise UsageError(f"{bad[0]!r} is no key=value, such as train.batch_size=1024; one configuration is planned")
    body = make_plan(read_recipe(config, overrides, stage), options)
    print(json.dumps(body, indent=2) if json_output else _readable(body))


def _parameter_rows(counted: dict[str, Any]) -> list[list[str]]:
    stated, difference = "", ""
    if counted["stated"] is not None:
        stated, difference = f"{counted['stated']:,}", f"{counted['difference_percent']:+.2f} %"
    rows = [[counted["config"], "total", f"{counted['total']:,}", stated, difference]]
    if counted["trainable"] < counted["total"]:
        rows.append(["", "learning", f"{counted['trainable']:,}", "", ""])
    return rows + [["", f"  {name}", f"{count:,}", "", ""] for name, count in counted["parts"].items()]


def _readable(body: dict[str, Any]) -> str:
    hardware, batch, flops, time = body["hardware"], body["batch"], body["flops"], body["time"]
    memory, data = body["memory"], body["data"]
    lines = [
        f"{body['config']}: {body['network']} on {hardware['gpus']} × {hardware['gpu']}",
        "",
        _table(_parameter_rows({"config": "parameters", **body["parameters"]})),
    ]
    lines += [
        f"frozen      {name}, {count:,} parameters" for name, count in body["parameters"]["frozen"].items() if count
    ]
    lines += [
        "",
        f"FLOPs an image      forward {_si(flops['forward'])}, backward {_si(flops['backward'])}, "
        f"recomputed {_si(flops['recomputed'])}, frozen encoders {_si(flops['frozen'])}",
        f"                    together {_si(flops['training_step'])}",
        f"batch               {batch['batch_size']:,} = {hardware['gpus']} GPUs × micro-batch {batch['micro_batch']} × "
        f"accumulation {batch['accumulation']}",
        "",
        _memory_table(memory, hardware["usable_bytes"]),
        _verdict(memory, body),
        "",
        f"a step              {time['step_seconds']:.3g} s, {time['images_per_second']:,.0f} images/s, at "
        f"{hardware['mfu']:.0%} of {hardware['peak_teraflops']:g} TFLOP/s (model FLOPs alone: "
        f"{time['model_mfu']:.0%})",
        f"{time['steps']:,} steps".ljust(20) + f"{time['days']:.3g} days, {_count(time['gpu_hours'])} GPU-hours, "
        f"{time['total_flops']:.3g} FLOPs",
        f"data read           {data['images']:,} images of {data['image_size']} px, {_bytes(data['bytes'])}",
    ]
    if time["cost"] is not None:
        lines.append(f"cost                {_count(time['cost'])}")
    return "\n".join([*lines, "", "Assumed:", *(f"- {text}" for text in body["assumptions"])])


def _memory_table(memory: dict[str, Any], usable: int) -> str:
    """Memory by ZeRO stage, in MiB for networks that need little."""
    keys = ("weights", "optimizer", "ema", "frozen", "gradients", "buffers", "activations", "total")
    small = memory["by_stage"][str(memory["zero_stage"])]["total"] < 2**30
    unit, size, digits = ("MiB", 2**20, 2) if small else ("GiB", 2**30, 1)
    rows = [["ZeRO", *keys, "fits", "largest micro-batch"]]
    for stage, row in memory["by_stage"].items():
        mark = "*" if int(stage) == memory["zero_stage"] else " "
        numbers = [f"{row[key] / size:,.{digits}f}" for key in keys]
        largest = "none" if row["largest_micro_batch"] is None else str(row["largest_micro_batch"])
        rows.append([f"{stage}{mark}", *numbers, "yes" if row["fits"] else "no", largest])
    return f"memory a GPU in {unit}, of {usable / size:,.0f} usable\n{_table(rows)}"


def _verdict(memory: dict[str, Any], body: dict[str, Any]) -> str:
    """One sentence: whether the planned run fits, and if not what would."""
    stage, batch = memory["zero_stage"], body["batch"]
    chosen = memory["by_stage"][str(stage)]
    if chosen["fits"]:
        return f"* ZeRO {stage} with micro-batch {batch['micro_batch']} fits"
    share = batch["batch_size"] // body["hardware"]["gpus"]
    if chosen["largest_micro_batch"] is not None:
        parts = share // chosen["largest_micro_batch"]
        return f"* ZeRO {stage} with micro-batch {batch['micro_batch']} does not fit; train.accumulation={parts} would"
    for other, row in memory["by_stage"].items():
        if row["largest_micro_batch"] is not None:
            parts = share // row["largest_micro_batch"]
            would = f"train.zero_stage={other} train.accumulation={parts} would"
            return f"* ZeRO {stage} does not fit with any micro-batch; {would}"
    return "* no ZeRO stage fits with any micro-batch; take more GPUs or larger ones"


def _table(rows: list[list[str]]) -> str:
    """Columns as wide as they need to be; numbers to the right, the first two columns to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = 2 if rows[0][0] in ("config", "parameters") else 1
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _si(number: float) -> str:
    """A number with three digits and its unit's prefix."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _bytes(number: float) -> str:
    text = _si(number)
    return f"{text}B" if " " in text else f"{text} B"
