"""How a data set is laid out, where it does not say so itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from metaxl_evo.ner.schemes import IOB2, PREFIXES, TagScheme


@dataclass(frozen=True)
class Layout:
    """What a reader has to know of a data set: how its tags are written."""

    scheme: TagScheme = field(default_factory=TagScheme)


@dataclass(kw_only=True)
class LayoutArguments:
    """The settings of a layout.

    Raises:
        ValueError: one line for the first value that cannot be.
    """

    label_scheme: str = field(
        default=IOB2, metadata={"help": f"How the data mark entities, one of {', '.join(PREFIXES)}; read as IOB2."}
    )
    entity_type: str | None = field(
        default=None, metadata={"help": "Type of all entities, where the tags are B, I and O alone (e.g. ENT)."}
    )

    def __post_init__(self) -> None:
        self.layout()

    def layout(self) -> Layout:
        """The layout that these settings say."""
        return Layout(TagScheme(self.label_scheme, self.entity_type))
