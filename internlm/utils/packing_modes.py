"""The packing modes, and which of them have a document mask. Shared by the config and the data sources."""

from __future__ import annotations

from typing import Literal, get_args

Packing = Literal["cut", "pack_sample_into_one", "unpacked", "best_fit"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)


def default_document_mask(packing: Packing) -> bool:
    """Whether attention stays within documents unless `data.document_mask` decides."""
    return packing != "pack_sample_into_one"


def document_mask_problem(packing: Packing, document_mask: bool) -> str | None:
    """Why a document mask contradicts the packing, and the fix; None if it does not."""
    if packing == "unpacked" and not document_mask:
        return (
            "data.document_mask = False with data.packing = 'unpacked': a row has one document, so there is none to "
            "attend to; set data.packing = 'cut' or 'best_fit', or leave data.document_mask out"
        )
    if packing == "pack_sample_into_one" and document_mask:
        return (
            "data.document_mask = True with data.packing = 'pack_sample_into_one', which is 'cut' without a document "
            "mask; set data.packing = 'cut', or leave data.document_mask out"
        )
    return None
