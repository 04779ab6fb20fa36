"""What moved says where it is now, and is there; what is exported stays."""

from importlib import import_module

import pytest

import smi


@pytest.mark.parametrize("old", sorted(smi._MOVED))
def test_a_former_name_says_the_new_one(old):
    with pytest.raises(ModuleNotFoundError, match=r"has moved\. It is now ") as said:
        import_module(f"smi.{old}")
    import_module(str(said.value).rpartition(" ")[2].removesuffix("."))


def test_another_name_fails_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"No module named .smi\.another."):
        import_module("smi.another")


def test_what_smi_exports_is_there():
    for name in smi.__all__:
        assert getattr(smi, name) is not None
