"""Which of the original timesteps a sampler keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from unclip.config import check_steps, count_steps
from unclip.errors import UsageError

Spacing = Literal["ends", "ddim", "trailing"]


def timesteps_from(
    spec: int | str | Sequence[int], timesteps: int, spacing: Spacing = "ends", *, lowest: int = 0
) -> list[int]:
    """The kept original timesteps, ascending indices in [0, T), as `spec` asks:

    a number, as 50 or "50": so many, by `spacing`;
    a spacing and a number, as "ddim50", "ends7", "trailing20" (see `spaced_timesteps`);
    an explicit list, as [0, 500, 999] or "0,500,999", in any order.

    Numbers spread over `lowest` … T − 1; a list is taken as it is.
    Raises UsageError: no such form, fewer than 1 or more than T − lowest steps, a timestep outside 0 … T − 1 or twice.
    """
    spec = check_steps(spec)
    if isinstance(spec, tuple):
        outside = [t for t in spec if t >= timesteps]
        if outside:
            raise UsageError(f"the timestep {outside[0]} does not exist; the process has 0 to {timesteps - 1}")
        return sorted(spec)
    if isinstance(spec, str):
        spacing = cast(Spacing, spec.rstrip("0123456789"))
    return [t + lowest for t in spaced_timesteps(timesteps - lowest, count_steps(spec), spacing)]


def check_steps_exist(spec: int | str | tuple[int, ...], timesteps: int, lowest: int = 0) -> None:
    """For validators of configurations: ValueError where `timesteps_from` refuses."""
    if lowest and lowest + count_steps(spec) > timesteps:
        raise ValueError(
            f"{count_steps(spec)} steps from timestep {lowest} up do not fit into {timesteps} timesteps"
        )
    try:
        timesteps_from(spec, timesteps, lowest=lowest)
    except UsageError as error:  # pydantic collects ValueErrors alone
        raise ValueError(str(error)) from error


def spaced_timesteps(timesteps: int, steps: int, spacing: Spacing = "ends") -> list[int]:
    """`steps` of the T original timesteps, ascending, as a list of indices in [0, T).

    ends: evenly with both ends included (Karlo; guided-diffusion's strides come to the same up to rounding).
    ddim: every (T // steps)-th from 0 (DDIM, §4.2, linear τ).
    trailing: every (T / steps)-th downwards from T − 1, which a schedule of zero terminal SNR needs (Lin et al. 2024,
    table 2).
    Raises UsageError when steps is below 1 or above T.
    """
    if not 1 <= steps <= timesteps:
        raise UsageError(
            f"{steps} sampling steps asked for; the process has {timesteps}, so 1 to {timesteps} are possible"
        )
    if spacing == "ddim":
        return list(range(0, timesteps, timesteps // steps))[:steps]
    if spacing == "trailing":
        return [round(timesteps - i * timesteps / steps) - 1 for i in range(steps)][::-1]
    if steps == 1:
        return [timesteps - 1]
    return [round(i * (timesteps - 1) / (steps - 1)) for i in range(steps)]
