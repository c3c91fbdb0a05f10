"""DDIM inversion on a trained network: sampling from the noise that was found returns the input."""

from __future__ import annotations

import pytest
import torch
from helpers_diffusion import T, draw_mixture, generator, no_noise, normal, process
from torch import Tensor, nn

from unclip.diffusion import ddim, ddim_inversion, make_denoiser, spaced_timesteps


class Network(nn.Module):
    """A small perceptron (x_t, t) -> ε̂ or v̂ over points of the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = t[:, None].float() / T
        return self.layers(torch.cat([x.float(), level, torch.sin(3 * level), torch.cos(3 * level)], dim=1))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_inversion_and_sampling_of_a_trained_network_return_the_input(prediction: str) -> None:
    ours = process(schedule="linear", prediction=prediction)
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    losses = []
    for number in range(300):
        x_start, _ = draw_mixture(256, seed=2 * number)
        x_start, noise = x_start.float(), normal(256, 2, seed=number).float()
        t = ours.sample_timesteps(256, generator(number))
        x_t = ours.q_sample(x_start, t, noise)
        loss = ours.losses(network(x_t, t), x_start, x_t, t, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert sum(losses[-20:]) < {"epsilon": 0.6, "v": 0.85}[prediction] * sum(losses[:20])  # v starts near its floor
    x_start = draw_mixture(50, seed=7)[0].float()
    steps = ours.steps(spaced_timesteps(T, 100, "ddim"))
    with torch.inference_mode():
        denoiser = make_denoiser(network, ours, {})
        x_t = ddim_inversion(denoiser, x_start, steps, no_noise, refinements=8)
        back = ddim(denoiser, x_t, steps, no_noise)
        plain = ddim(denoiser, ddim_inversion(denoiser, x_start, steps, no_noise), steps, no_noise)
    assert bool((x_t.std(0) > 0.6).all()) and bool((x_t.std(0) < 1.4).all())  # it is noise that was found
    assert float((back - x_start).abs().max()) < 1e-3
    assert float((plain - x_start).abs().max()) > 1e-3
