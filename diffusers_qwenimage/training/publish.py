"""The result of a run on a hub: the last weights, the model card, the loss curve and validation pictures."""

import logging
import re
from pathlib import Path
from typing import Any, Literal

from diffusers_qwenimage.loading.hubs import DownloadError, explained

from .logs import SAMPLES

logger = logging.getLogger(__name__)

Hub = Literal["huggingface", "modelscope"]
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_login(repository: str, hub: Hub) -> None:
    """Find out before the run whether the hub knows the user.

    Raises:
        ValueError: if the repository has no ORG/NAME, or nobody is logged in.
        DownloadError: if the hub cannot be reached.
    """
    if not NAME.fullmatch(repository):
        raise ValueError(f"push_to_hub must be ORG/NAME, got {repository!r}.")
    try:
        with explained(hub, repository):
            _client(hub).whoami()
    except DownloadError as error:
        how = "hf auth login" if hub == "huggingface" else "modelscope login"
        raise ValueError(
            f"push_to_hub: {hub} does not accept this user: {error} Log in ({how}), or leave push_to_hub out."
        ) from error


def publish(output: Path, weights: Path, repository: str, hub: Hub, *, private: bool) -> None:
    """Make the repository if it does not exist, and upload in one commit.

    Args:
        output: of the run.
        weights: the file that was written last, in `output`.
        repository: ORG/NAME.
        hub: where.
        private: whether a new repository can be seen by its owner alone.

    Raises:
        DownloadError: if the hub refuses or cannot be reached; everything is still in `output`.
    """
    client: Any = _client(hub)
    beside = weights.with_name(f"{weights.stem}-ema{weights.suffix}")
    patterns = [weights.name, beside.name, "README.md", "config.json", "loss.png", f"{SAMPLES}/*"]
    if weights.is_dir():
        patterns.append(f"{weights.name}/*")
    message = f"Weights {weights.stem}"
    with explained(hub, repository):
        if hub == "huggingface":
            client.create_repo(repository, private=private, exist_ok=True)
            client.upload_folder(
                repo_id=repository, folder_path=output, allow_patterns=patterns, commit_message=message
            )
        else:
            if not client.repo_exists(repository, "model"):
                client.create_repo(repository, "model", visibility="private" if private else "public")
            client.upload_folder(repository, "model", output, allow_patterns=patterns, commit_message=message)
    logger.info("Pushed %s to %s on %s.", weights.name, repository, hub)


def _client(hub: Hub) -> Any:
    if hub == "huggingface":
        from huggingface_hub import HfApi

        return HfApi()
    from modelscope_hub import HubApi

    return HubApi()
