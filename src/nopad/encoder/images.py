"""How an encoder's images are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nopad.pipeline.pack_processor import PackProcessor
from nopad.preprocessing.config import read_preprocessor_config
from nopad.preprocessing.rules import Preprocessing


class ImageRules:
    """The rule by which images are made: the family's published one, the checkpoint's own, or one that is assigned.

    Attributes:
        source: the checkpoint that this encoder was loaded from, as it was named.
        preprocessor_config: its `preprocessor_config.json`, or that part of its `processor_config.json`.
    """

    config: Any
    source: str | None = None
    preprocessor_config: dict[str, Any] | None = None
    _preprocessing: Preprocessing | None = None

    @staticmethod
    def published_preprocessing(config: Any) -> Preprocessing:
        """The family's published rule, where a checkpoint does not bring its own."""
        raise NotImplementedError

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels are made: `model_preprocessing`, unless another rule is assigned, as `nopad.load(size=…)` does."""
        return self._preprocessing or self.model_preprocessing

    @preprocessing.setter
    def preprocessing(self, rule: Preprocessing) -> None:
        self._preprocessing = rule

    @property
    def model_preprocessing(self) -> Preprocessing:
        """The rule of the checkpoint's own preprocessor config, else the family's."""
        return self.read_preprocessing(self.config, self.preprocessor_config, self.source)

    @property
    def default_preprocessing(self) -> Preprocessing:
        """The family's published rule."""
        return self.published_preprocessing(self.config)

    @classmethod
    def read_preprocessing(
        cls, config: Any, preprocessor_config: Mapping[str, Any] | None, source: str | None
    ) -> Preprocessing:
        """How pixels are made by a config, a preprocessor config and the family's rule, without an encoder.

        Args:
            config: of the encoder.
            preprocessor_config: the checkpoint's, `None` where it has none.
            source: the checkpoint, for messages.

        Raises:
            ValueError: a preprocessor config that no rule here reproduces.
        """
        default = cls.published_preprocessing(config)
        if preprocessor_config is None:
            return default
        return read_preprocessor_config(preprocessor_config, default, f"checkpoint {source!r}: preprocessor config")

    @property
    def processor(self) -> PackProcessor:
        """Makes the packs of `pack`, on the CPU and without this encoder: for the workers of a DataLoader."""
        encoder: Any = self
        return PackProcessor.of(encoder)
