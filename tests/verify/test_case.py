"""Cases, their references, and the combinations they are made of."""

from __future__ import annotations

import pytest

from internlm.utils.errors import ConfigError
from internlm.verify.case import Case, Combination
from internlm.verify.choices import BatchChoices, LayoutChoices
from internlm.verify.matrix import pairwise_matrix


def test_every_combination_of_the_matrix_is_made_again_from_its_line() -> None:
    for combination in pairwise_matrix():
        assert Combination.parse(str(combination)) == combination


def test_the_reference_is_the_same_run_in_one_process() -> None:
    case = Combination.parse("ranks=8 layout:tensor=2,mode=isp,weight=2,pipeline=2,zero=2 model:tied").case()
    reference = case.reference()
    assert (case.world_size, case.config.data.micro_num, case.num_micro_batches) == (8, 2, 4)
    assert (reference.world_size, reference.config.data.micro_num, reference.num_micro_batches) == (1, 4, 4)
    assert LayoutChoices.of(reference.config) == LayoutChoices()
    assert reference.documents == case.documents
    kept = {"parallel", "data"}
    assert case.config.model_dump(exclude=kept) == reference.config.model_dump(exclude=kept)


def test_layouts_of_one_model_share_a_reference() -> None:
    texts = ["ranks=4 layout:zero=2", "ranks=4", "ranks=8 layout:tensor=2,mode=msp"]
    references = {Combination.parse(text).case().reference().fingerprint for text in texts}
    assert len(references) == 1
    others = ["ranks=4 model:tied", "ranks=4 documents:masked=ends", "ranks=2"]
    assert len({Combination.parse(text).case().reference().fingerprint for text in others} | references) == 4


def test_a_wrong_line_is_refused() -> None:
    for text in ["", "ranks=", "layout:tensor=2", "ranks=2 layot:tensor=2", "ranks=2 layout:tensr=2"]:
        with pytest.raises(ConfigError):
            Combination.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ranks=3 layout:tensor=2", "world size"),
        ("ranks=2 layout:zero=3", "zero = 3"),
        ("ranks=2 layout:pipeline=2,fsdp", "fsdp"),
        ("ranks=2 layout:weight=2", "isp"),
        ("ranks=2 stepping:micro_batches=3", "data ranks"),
        ("ranks=2 layout:tensor=0", "tensor.size"),
    ],
)
def test_what_a_user_could_not_run_is_known_beforehand(text: str, reason: str) -> None:
    assert any(reason in mistake for mistake in Combination.parse(text).problems())


def test_a_case_is_what_its_documents_and_config_say() -> None:
    one = Combination.parse("ranks=2").case()
    assert one == Combination.parse("ranks=2").case()
    assert one != Case(one.config, 2, BatchChoices(packed=False))
