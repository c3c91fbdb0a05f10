"""Training a small open_clip-configured CLIP, so that a system can be whole without downloads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unclip.bundle import BUNDLED, MANIFEST, load_strict, read_manifest, resolve_model
from unclip.clip import build_trainable, clip_loss, save_folder, write_vocabulary
from unclip.clip_identity import WEIGHTS_FILE
from unclip.errors import UnclipError, UsageError
from unclip.training.clip_config import VOCABULARY, ClipRunConfig, check_batch
from unclip.training.distributed import Distributed
from unclip.training.engine import micro_batch_size
from unclip.training.finetune import Tuning
from unclip.training.launch import open_batches
from unclip.training.loop import fit


def run(config: ClipRunConfig, distributed: Distributed) -> Path:
    """Train and write the model in open_clip's local-dir layout."""
    try:
        check_batch(micro_batch_size(config.train, distributed))  # several processes share a batch
    except ValueError as error:
        raise UsageError(str(error)) from error
    run_dir = Path(config.train.run_dir)
    vocabulary_folder = run_dir / f"vocabulary-{distributed.rank}"  # one a process: no file is written twice
    try:
        vocabulary_folder.mkdir(parents=True, exist_ok=True)
        write_vocabulary(vocabulary_folder / VOCABULARY, config.model.vocabulary_merges)
    except OSError as error:
        raise UnclipError(f"the run folder {run_dir} cannot be written: {error.strerror or error}") from error
    torch.manual_seed(config.train.seed)
    model, tokenizer = build_trainable(config.model.open_clip_config(), vocabulary_folder)
    if config.init_from is not None:
        carry_over(model, config.init_from)
    teacher = None
    if config.keep_embeddings:
        teacher = copy.deepcopy(model).to(distributed.device).eval().requires_grad_(False)
    Tuning(model, config.train, "clip", config.model)

    def loss_fn(network: Any, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        output = network(batch["image"], tokenizer(batch["caption"]).to(batch["image"].device))
        image, text = output["image_features"].float(), output["text_features"].float()
        loss = clip_loss(image, text, bounded(output["logit_scale"]), distributed.rank, distributed.world_size)
        crowding = (crowding_loss(image) + crowding_loss(text)) / 2
        similarity = image @ text.T
        accuracy = (similarity.argmax(1) == torch.arange(len(image), device=image.device)).float()
        losses = {"contrastive": loss[None], "crowding": crowding[None], "accuracy": accuracy}
        total = loss + config.spread_weight * crowding
        if teacher is not None:
            drift = drift_loss(teacher, image, batch["plain"]) * batch["has_plain"].to(image.device)
            losses["drift"] = drift
            total = total + config.keep_embeddings * drift.mean()
        return {"loss": total[None], **losses}

    def export(state: dict[str, Tensor], folder: Path) -> None:
        # open_clip's loader is strict: no non-persistent buffers, and a logit scale without dimensions.
        body = {name: state[name].half() for name in model.state_dict()}
        body["logit_scale"] = body["logit_scale"].reshape(())
        save_folder(folder, config.model.open_clip_config(), body, vocabulary_folder / VOCABULARY)

    batches = open_batches(config.data, config.train, distributed)
    return fit(model, loss_fn, batches, config.train, run_config=config, export=export)


def carry_over(model: nn.Module, name: str) -> None:
    """Load the weights of the CLIP that `init_from` names. UnclipError: there is none, or its sizes differ."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = resolve_model(name) if name == BUNDLED else Path(name).expanduser()
    if (folder / MANIFEST).is_file():
        folder = folder / read_manifest(folder)["parts"]["clip"]
    elif (folder / "model" / WEIGHTS_FILE).is_file():
        folder = folder / "model"
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UnclipError(
            f"init_from names {name!r}, where there is no {WEIGHTS_FILE}; name a run of train_clip.py, a bundle, or "
            "the folder of a CLIP in open_clip's layout"
        )
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UnclipError(f"{file} is damaged or not a safetensors file: {error}") from error
    own = model.state_dict()
    state["logit_scale"] = state["logit_scale"].reshape(own["logit_scale"].shape)  # here it has a dimension
    load_strict(model, state, folder)


def bounded(scale: Tensor) -> Tensor:
    """CLIP's logit scale, at most 100 (Radford et al. 2021, §2.5), with the gradient of an unbounded one: a clamp's is
    zero above, where momentum may carry the parameter, and nothing would bring it back.
    """
    return scale + (scale.clamp(max=100) - scale).detach()


def drift_loss(teacher: Any, image: Tensor, plain: Tensor) -> Tensor:
    """1 − cos of unit embeddings (B, E), of pictures augmented and restyled, with the teacher's of the plain ones
    (B, 3, S, S) in [-1, 1]: (B,).

    The teacher's embedding is the target, as in knowledge distillation (Hinton et al. 2015), so that the space stays
    where priors and decoders have learned it while more pictures find their place in it.
    """
    with torch.no_grad():
        kept = teacher.encode_image(plain.to(image.device), normalize=True).float()
    return 1 - (image * kept).sum(1)


def crowding_loss(embedding: Tensor) -> Tensor:
    """Unit vectors (B, E) -> log(E·Σλ² / (Σλ)²) of their covariance's eigenvalues λ: 0 where all dimensions share
    alike, log E where one holds everything.

    (Σλ)²/Σλ² is the participation ratio, the number of dimensions in use. A small CLIP trained for a short time uses
    few (the "dimensional collapse" of Jing et al. 2022, arXiv 2110.09348), its neighbours lie close, and a prior's
    small error is then another picture. Penalising the covariance's squares follows VICReg (Bardes et al. 2022).
    """
    centred = embedding - embedding.mean(0)
    covariance = centred.T @ centred / len(centred)
    return (len(covariance) * covariance.square().sum() / covariance.trace().square().clamp_min(1e-12)).log()
