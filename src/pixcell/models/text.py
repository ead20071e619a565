"""Text to token states: the text tower of CLIP, or of PLIP, read before its pooling.

    encoder = TextEncoder.from_pretrained("plip", download=True)
    states = encoder(["high tumor; low til; invasive ductal carcinoma"]).states    # (1, 154, 512)

What enters cross-attention is the last hidden state of every place, after the final layer norm: no pooling,
no projection. How many places there are is a policy:

    windows   the published one: 154 places, the tower's window twice. The text is cut into tokens once (one
              begin, one end, then padding), the ids are laid into windows of 77 which each get the positions
              0 to 76, and the tower runs once over all of them with one causal mask. Place 77 thus has
              position 0 and no begin token, which CLIP never saw; models trained so expect it.
    pad77     one window of 77.
    tight     as many places as asked for, at most one window: less to attend to, for models trained so.

Padded places are masked as keys inside the tower, but have states of their own, and a U-Net without a mask
attends to them: an empty prompt is 154 places of context, not nothing. ``TextStates.mask`` tells them apart.

Source: PathLDM (https://arxiv.org/abs/2309.00748), CLIP (https://arxiv.org/abs/2103.00020).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pixcell.errors import MissingWeights, ModelError, WrongWeights
from pixcell.models.pathldm_layout import from_ldm
from pixcell.models.weight_files import open_weights
from pixcell.models.weights import empty_parameters, fetch, load_stored, weights_sha256

__all__ = [
    "PUBLISHED_TEXT_ENCODERS",
    "PublishedTextEncoder",
    "TextEncoder",
    "TextPolicy",
    "TextStates",
    "encode_tokens",
    "load_text_tower",
    "load_tokenizer",
]

_log = logging.getLogger(__name__)

TextPolicy = Literal["windows", "pad77", "tight"]
"""How many places a prompt has; see the top of the module."""
TooLong = Literal["error", "truncate"]
"""What happens to a prompt that does not fit."""


@dataclass(frozen=True)
class PublishedTextEncoder:
    """A text encoder that can be asked for by name."""

    repository: str
    """On the Hugging Face hub."""
    licence: str
    """As commonly stated; not looked up on the model's page."""
    weight_file: str
    note: str


PUBLISHED_TEXT_ENCODERS = {
    "plip": PublishedTextEncoder(
        "vinid/plip", "not verified: see its model page", "pytorch_model.bin", "the best of PathLDM"
    ),
    "clip": PublishedTextEncoder(
        "openai/clip-vit-base-patch32", "MIT (its code)", "model.safetensors", "what PLIP was tuned from"
    ),
}
"""Text encoders by name: both are ViT-B/32, 512 wide, 63 million parameters."""

_TOKENIZER_FILES = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")


@dataclass(frozen=True)
class TextStates:
    """Prompts as a U-Net sees them."""

    states: Float[Tensor, "batch places dim"]
    """Last hidden states, float32."""
    mask: Bool[Tensor, "batch places"]
    """True where there is text (begin and end included), False where there is padding."""
    num_tokens: tuple[int, ...]
    """Tokens each prompt needs, begin and end included; more than there are places: it was cut."""


def encode_tokens(
    tower: nn.Module, ids: Int[Tensor, "batch places"], mask: Int[Tensor, "batch places"]
) -> Float[Tensor, "batch places dim"]:
    """Return the last hidden states of token ids, float32.

    Args:
        tower: A ``CLIPTextModel`` of transformers.
        ids: Within the tower's window, or a whole number of windows, each of which begins at position 0.
        mask: 1 where there is text, 0 where there is padding.

    Raises:
        ModelError: If the ids fill no whole number of windows.
    """
    window = _config(tower).max_position_embeddings
    places = ids.shape[1]
    if places <= window:
        return tower(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    if places % window:
        raise ModelError(f"{places} places are no whole number of windows of {window}.")
    name, table = next(
        (name, table)
        for name, table in tower.named_parameters()
        if name.endswith("embeddings.position_embedding.weight")
    )
    # The tower refuses more places than its table has rows. A table that repeats itself is what the windows
    # mean, and leaves all else to the library: one causal mask over all places, the padding mask, the norm.
    windows = places // window
    positions = torch.arange(places, device=ids.device)[None]
    output = torch.func.functional_call(
        tower,
        {name: table.repeat(windows, 1)},
        kwargs={"input_ids": ids, "attention_mask": mask, "position_ids": positions},
    )
    return output.last_hidden_state.float()


class TextEncoder:
    """A text tower with its tokenizer and a policy.

    Args:
        tower: A ``CLIPTextModel`` of transformers.
        tokenizer: Its tokenizer.
        policy: How many places a prompt has; one of :data:`TextPolicy`.
        length: Places asked for. ``windows``: rounded up to whole windows, by default two; ``tight``: taken
            as it is, by default one window; ``pad77`` takes none.
        too_long: What to do with prompts that do not fit: ``"error"``; or ``"truncate"``, as the published
            training did: the end of the text is lost, the end token stays.
        name: What reports call it.

    Raises:
        ModelError: If policy and length contradict each other, or tokenizer and tower do.
    """

    def __init__(
        self,
        tower: nn.Module,
        tokenizer: Any,
        *,
        policy: str = "windows",
        length: int | None = None,
        too_long: str = "error",
        name: str = "text",
    ) -> None:
        self.tower, self.tokenizer, self.name = tower, tokenizer, name
        self.policy, self.too_long = policy, too_long
        config = _config(tower)
        self.window: int = config.max_position_embeddings
        self.length = _places(policy, length, self.window)
        if too_long not in get_args(TooLong):
            raise ModelError(f"too_long {too_long!r} is not known; choose error or truncate.")
        # Not only fewer: a tokenizer that lost its words numbers every text alike, without an error.
        if len(tokenizer) != config.vocab_size:
            raise ModelError(
                f"the tokenizer knows {len(tokenizer)} tokens, the text tower {config.vocab_size}: "
                "they are not of the same model."
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        policy: str = "windows",
        length: int | None = None,
        too_long: str = "error",
        download: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TextEncoder":
        """Load a text encoder from a folder, or by name.

        Args:
            name_or_path: One of :data:`PUBLISHED_TEXT_ENCODERS`; ``owner/name`` on the Hugging Face hub; a
                folder with configuration, weights and tokenizer, or with such folders ``text_encoder`` and
                ``tokenizer`` in it. The model may be a whole CLIP; only its text tower is read.
            policy: How many places a prompt has.
            length: Places asked for.
            too_long: What to do with prompts that do not fit.
            download: Whether files that are not on this machine may be downloaded.
            device: Where it runs.
            dtype: Number format to compute in.

        Raises:
            MissingWeights: If it is not on disk and may not be downloaded.
            WrongWeights: If the weights do not fit the configuration.
            ModelError: If the folder holds no CLIP.
        """
        folder, name = _find(str(name_or_path), download)
        weights, words = folder / "text_encoder", folder / "tokenizer"
        tower = load_text_tower(weights if weights.is_dir() else folder, dtype=dtype).to(device)
        tokenizer = load_tokenizer(words if words.is_dir() else folder)
        return cls(tower, tokenizer, policy=policy, length=length, too_long=too_long, name=name)

    @property
    def dim(self) -> int:
        """Width of a state."""
        return int(_config(self.tower).hidden_size)

    def tokenize(
        self, prompts: str | Sequence[Any]
    ) -> tuple[Int[Tensor, "batch places"], Int[Tensor, "batch places"], tuple[int, ...]]:
        """Return token ids, mask, and how many tokens each prompt needs.

        Args:
            prompts: Texts; the empty one is the "no condition" of PathLDM.

        Raises:
            ModelError: If a prompt is no text, or does not fit.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ModelError("prompts must be texts, at least one.")
        # verbose=False: the tokenizer would warn of more tokens than a window has, which is no fault here.
        texts = [
            self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids for prompt in prompts
        ]
        counts = tuple(len(text) + 2 for text in texts)
        self._check_lengths(prompts, counts)
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = torch.full((len(texts), self.length), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            tokens = [begin, *text[: self.length - 2], end]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask, counts

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[Any]) -> TextStates:
        """Return the states of prompts, on the device of the tower.

        Raises:
            ModelError: If a prompt is no text, or does not fit.
        """
        ids, mask, counts = self.tokenize(prompts)
        device = next(self.tower.parameters()).device
        states = encode_tokens(self.tower, ids.to(device), mask.to(device))
        return TextStates(states, mask.to(states.device, torch.bool), counts)

    def made_by(self) -> dict[str, Any]:
        """Return what a store or a pipeline keeps about this encoder; equal for equal numbers."""
        return {
            "name": self.name,
            "sha256": weights_sha256(self.tower),
            "dim": self.dim,
            "policy": self.policy,
            "length": self.length,
        }

    def _check_lengths(self, prompts: Sequence[str], counts: Sequence[int]) -> None:
        long = [row for row, count in enumerate(counts) if count > self.length]
        if not long:
            return
        first = f"{' '.join(prompts[long[0]].split()[:6])} ..."
        what = (
            f"{len(long)} of {len(prompts)} prompts need more than the {self.length} places of policy "
            f"{self.policy!r}: number {long[0]} ({first!r}) needs {counts[long[0]]}"
        )
        if self.too_long == "error":
            raise ModelError(f"{what}. Shorten them, or pass too_long='truncate' to lose their ends.")
        _log.warning("%s; the ends of their texts are not used.", what)


def _config(tower: nn.Module) -> Any:
    """Return what a model of transformers states of itself; ``nn.Module`` does not know of it."""
    return tower.config


def _places(policy: str, length: int | None, window: int) -> int:
    if policy not in get_args(TextPolicy):
        raise ModelError(
            f"text policy {policy!r} is not known; choose one of {', '.join(get_args(TextPolicy))}."
        )
    if length is not None and length < 2:
        raise ModelError(f"{length} places do not hold even an empty prompt, which has a begin and an end.")
    if policy == "windows":
        return window * (2 if length is None else -(-length // window))
    if policy == "pad77" and length not in (None, window):
        raise ModelError(f"policy 'pad77' has {window} places; for {length} use 'tight' or 'windows'.")
    if length is not None and length > window:
        raise ModelError(f"policy {policy!r} has at most {window} places; for {length} use 'windows'.")
    return window if length is None else length


# ── files ────────────────────────────────────────────────────────────────────────────────────────────


def load_text_tower(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the text tower of a CLIP, strictly: every tensor of the tower must be there, and no other.

    Args:
        folder: With ``config.json`` and weights, of a whole CLIP or of its text tower.
        dtype: Number format to compute in.

    Raises:
        MissingWeights: If configuration or weights are not there.
        WrongWeights: If names or shapes do not fit.
        ModelError: If it is no CLIP.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if not (folder / "config.json").is_file():
        raise MissingWeights(
            f"{folder} holds no config.json. Give the folder of a CLIP or of its text tower."
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} is not the configuration of a model.") from error
    if kind not in ("clip", "clip_text_model"):
        raise ModelError(f"{folder} holds a {kind!r}; a text encoder is a 'clip' or a 'clip_text_model'.")
    # A whole CLIP describes its tower inside; what is not said there is the default of CLIPTextConfig.
    settings = config.get("text_config") or {} if kind == "clip" else config
    with empty_parameters():
        model = CLIPTextModel(
            CLIPTextConfig(**{key: settings[key] for key in _TOWER_KEYS if key in settings})
        )
    stored = open_weights(folder)
    load_stored(model, stored.converted(lambda state: from_ldm(model, _tower_only(state, folder))), dtype)
    return model.eval().requires_grad_(False)


_TOWER_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _tower_only(state: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return the tower under the names of transformers 4, out of a whole CLIP or of the tower alone."""
    bare = not any(name.startswith("text_model.") for name in state)
    tower = {
        "text_model." + name if bare else name: value
        for name, value in state.items()
        # The other half of a CLIP, and positions 0, 1, 2, ... that old versions stored.
        if bare or name.startswith("text_model.")
    }
    tower.pop("text_model.embeddings.position_ids", None)
    if "text_model.embeddings.token_embedding.weight" not in tower:
        raise WrongWeights(f"{source} holds no text tower of a CLIP.")
    return tower


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a CLIP.

    Args:
        folder: With ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

    Raises:
        MissingWeights: If they are not there: without them transformers would make one that knows no word.
        ModelError: If they are damaged.
    """
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise MissingWeights(
            f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt."
        )
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error


def _find(name: str, download: bool) -> tuple[Path, str]:
    """Return the folder, and what the encoder is called."""
    published = PUBLISHED_TEXT_ENCODERS.get(name)
    if published is None and Path(name).is_dir():
        return Path(name), Path(name).resolve().name
    known = ", ".join(PUBLISHED_TEXT_ENCODERS)
    if published is None and name.count("/") != 1:
        raise MissingWeights(
            f"{name!r} is neither a folder nor a known text encoder ({known}). "
            "Give a folder with configuration, weights and tokenizer, a name, or owner/name on the hub."
        )
    weights = (published.weight_file,) if published else ("model.safetensors", "pytorch_model.bin")
    folder = fetch(
        published.repository if published else name,
        ("config.json", *_TOKENIZER_FILES, *weights),
        download=download,
        advice="Or pass a folder that holds the text encoder and its tokenizer.",
    )
    return folder, name if published else name.split("/")[1]
