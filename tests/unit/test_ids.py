import pytest

from farshore.ids import ID_BYTES, NAME_CHARS_MAX, id_from_hex, id_to_hex, new_id, valid_name


def test_ids_are_random_and_read_back() -> None:
    ids = {new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(value) == ID_BYTES and id_from_hex(id_to_hex(value)) == value for value in ids)


@pytest.mark.parametrize(
    "text", ["", "00" * 15, "00" * 17, "AA" * 16, "zz" * 16, " " + "00" * 16, "00" * 16 + "\n"]
)
def test_an_id_has_one_text_form_only(text: str) -> None:
    with pytest.raises(ValueError, match="is not an id"):
        id_from_hex(text)


def test_hex_of_something_that_is_no_id_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        id_to_hex(b"abc")


@pytest.mark.parametrize("text", ["a", "0", "db-1.example_x", "vda", "a" * NAME_CHARS_MAX])
def test_valid_names(text: str) -> None:
    assert valid_name(text)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", ".a", "-a", "_a", "A", "a/b", "a b", "a\n", "ä", "a\0", "٣", "a" * (NAME_CHARS_MAX + 1)],
)
def test_names_that_could_be_a_path_an_option_or_two_things_are_refused(text: str) -> None:
    assert not valid_name(text)
