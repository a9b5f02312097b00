"""`PackedEncoder.save_pretrained`: folders that the original class loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.modeling_utils import PreTrainedModel

from nopad.checkpoints import state_dicts
from nopad.checkpoints.keywords import read_saving
from nopad.inference.precision import check_saving

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def save_pretrained(
    encoder: PackedEncoder, save_directory: Any, *args: Any, whole: bool = False, **kwargs: Any
) -> None:
    """Save under the original's tensor names, so that the original class loads the folder too.

    A projection, which the original vision class does not have, lies in a file of its own. Takes transformers'
    arguments; `state_dict` is written as it is.

    Args:
        encoder: the encoder that is saved.
        save_directory: the folder, made where there is none.
        whole: write both towers, the tokenizer too, as the original class of both loads them (`SiglipModel`, …).

    Raises:
        ValueError: the layers are in another format, see `precision`; `whole` without a text tower.
        TypeError: an unknown argument.
    """
    check_saving(encoder.precision)
    arguments = read_saving(save_directory, *args, **kwargs)
    if whole:
        from nopad.text.whole import save_whole  # with transformers' text classes

        save_whole(encoder, arguments)
        state_dicts.save_beside(encoder, save_directory, with_projection=False)
        return
    apart = arguments["state_dict"] is None and state_dicts.may_lie_apart(encoder)
    if apart:
        arguments["state_dict"] = state_dicts.without_projection(encoder)
    state = state_dicts.to_file(encoder, arguments)
    if state is not arguments["state_dict"]:  # under the names of files already, which transformers would convert again
        arguments |= {"state_dict": state, "save_original_format": False}
    PreTrainedModel.save_pretrained(encoder, **arguments)
    if arguments["is_main_process"]:
        state_dicts.save_beside(encoder, save_directory, with_projection=apart)
