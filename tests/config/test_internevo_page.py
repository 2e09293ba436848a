"""doc/from_internevo.md is what the schema, the list of differing defaults and the command line say."""

import argparse
import re
from pathlib import Path

import pytest

from internlm.commands import train
from internlm.config.internevo_differences import DIFFERENCES, PAGE
from internlm.config.internevo_page import update
from internlm.config.schema import Config
from internlm.config.schema.base import walk_schema
from internlm.config.unsupported import LATER_KEYS

PATH = Path(__file__).parents[2] / PAGE
TEXT = PATH.read_text()


def test_its_tables_are_up_to_date():
    assert update(TEXT) == TEXT, f"run: python -m internlm.config.internevo_page {PAGE}"


def test_a_table_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="0 places for the table 'defaults'"):
        update(TEXT.replace("<!-- table: defaults -->", ""))


def test_it_names_only_keys_that_there_are():
    known = {path for path, _ in walk_schema(Config)} | set(LATER_KEYS)
    sections = {path.partition(".")[0] for path in known}
    for key in re.findall(r"`((?:\w+\.)+\w+)(?: = [^`]*)?`", TEXT.partition("## Imports")[0]):
        assert key in known or key.partition(".")[0] not in sections or key.endswith((".py", ".md")), key


def test_it_has_every_option_of_internevo():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    ours = {option for action in parser._actions for option in action.option_strings}
    theirs = (
        "config launcher host port world_size rank local_rank backend seed profiling enable_ali_topology "
        "disable_volc_topology"
    )
    for name in theirs.split():
        assert f"--{name}" in TEXT and f"--{name.replace('_', '-')}" in ours


def test_defaults_that_differ_are_those_of_the_schema():
    known = dict(walk_schema(Config))
    for difference in DIFFERENCES:
        for key in difference.keys:
            default = known[key].default
            assert default is None or key == "model.use_scaled_init" or str(default) == difference.here, key
