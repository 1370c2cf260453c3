"""How to say where the heads and neurons of an architecture live. The entries are in `architectures.py`."""

from __future__ import annotations

from dataclasses import dataclass


LAYOUTS = ("stacked", "interleaved")


@dataclass(frozen=True)
class Attention:
    """One attention of a block. Names are those below the block.

    Args:
        module (`str`): the module that does the attention and knows the number of its heads.
        query, key, value (`str`): projections with a run of rows for each head. The same name three times says that
            they are one fused matrix.
        output (`str`): the projection whose columns are the heads side by side.
        layout (`str`): of a fused matrix: `"stacked"` (all queries, then all keys, then all values) or `"interleaved"`
            (query, key and value of the first head, then of the second).
        also (`tuple[str, ...]`): further projections with rows like the keys', if the model has them.
        position_bias (`str`): where a bias with one value a head comes from: `""` (there is none), `"given"` (passed to
            `module` as its third argument `position_bias`) or `"shared"` (as in T5: computed by the first block and
            handed on).
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    layout: str = "stacked"
    also: tuple[str, ...] = ()
    position_bias: str = ""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} is unknown. Use one of {', '.join(map(repr, LAYOUTS))}.")
        if self.position_bias not in ("", "given", "shared"):
            raise ValueError(f"position_bias={self.position_bias!r} is unknown. Use '', 'given' or 'shared'.")

    @property
    def fused(self) -> bool:
        """Whether queries, keys and values are one matrix."""
        return self.query == self.key == self.value


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward network of a block. Names are those below the block.

    Args:
        up (`tuple[str, ...]`): projections with a row for each neuron: the first matrix, and the gate if there is one.
            Names that a model lacks are passed over, as long as it has one of them.
        down (`str`): the projection with a column for each neuron.
        fused (`int`): how many matrices `up` holds one below the other, as 2 for a gate and its input.
    """

    up: tuple[str, ...]
    down: str
    fused: int = 1


@dataclass(frozen=True)
class Block:
    """Blocks of one kind.

    Args:
        name (`str`): name of the blocks from the backbone on, with `*` for their number: `"encoder.layer.*"`.
        attentions (`tuple[Attention, ...]`): attentions of a block.
        feed_forwards (`tuple[FeedForward, ...]`): feed-forward networks of a block.
        repeats (`str`): for shared blocks, the config's field that says how many times they run in all.
        decoder (`bool`): whether the blocks see the decoder's tokens in an encoder-decoder model.
        prenorm (`bool` or `str`): whether the norms come before attentions and feed-forward networks, so that a block
            whose attentions and networks put out nothing hands on what comes in, and can be removed as a whole. Or the
            config's field that says so.
    """

    name: str
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    repeats: str = ""
    decoder: bool = False
    prenorm: bool | str = False


Anatomy = tuple[Block, ...]
_ANATOMIES: dict[str, Anatomy] = {}


def register_anatomy(model_type: str, *blocks: Block) -> None:
    """Say where heads and neurons of an architecture live, so that they can be pruned and taken out.

    Args:
        model_type (`str`): `config.model_type` of the models.
        *blocks ([`Block`]): one for each kind of block that the models have.

    Raises:
        ValueError: no block was given.

    Example:

        ```py
        >>> from peft_prune.structure.anatomy import Attention, Block, FeedForward, register_anatomy

        >>> attention = Attention("attn", "attn.q", "attn.k", "attn.v", "attn.out")
        >>> register_anatomy("my-model", Block("layers.*", (attention,), (FeedForward(("mlp.up",), "mlp.down"),)))
        ```
    """
    if not blocks:
        raise ValueError(f"register_anatomy({model_type!r}) needs at least one Block.")
    _ANATOMIES[model_type] = blocks


def known_architectures() -> list[str]:
    """Every `model_type` that has an anatomy."""
    return sorted(_ANATOMIES)


def anatomy_of(model_type: str | None) -> Anatomy:
    """The anatomy of an architecture.

    Raises:
        ValueError: there is none; the message says how to give one.
    """
    if model_type not in _ANATOMIES:
        raise ValueError(
            f"Where heads and neurons of model_type={model_type!r} live is not known. Known are "
            f"{', '.join(known_architectures())}. Describe it with peft_prune.register_anatomy({model_type!r}, "
            "Block(...)), see its documentation."
        )
    return _ANATOMIES[model_type]
