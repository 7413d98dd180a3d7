"""Files of numbers: every dialect that people save, and one clear sentence for every mistake."""

import numpy as np
import pytest
import torch

from pycnf.data import InputError, read_table

ROWS = np.array([[1.0, 2.5], [3.0, -4.0], [5.0, 6e3]])


def write(tmp_path, text, name="data.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a,b\n1,2.5\n3,-4\n5,6e3\n", ("a", "b")),
        ("1,2.5\n3,-4\n5,6e3\n", ("column 1", "column 2")),
        ("1,2.5\n3,-4\n5,6e3", ("column 1", "column 2")),
        ("\ufeffa,b\r\n1,2.5\r\n3,-4\r\n5,6e3\r\n", ("a", "b")),
        ("a;b\n1;2.5\n3;-4\n5;6e3\n", ("a", "b")),
        ("a\tb\n1\t2.5\n3\t-4\n5\t6e3\n", ("a", "b")),
        ("a|b\n1|2.5\n3|-4\n5|6e3\n", ("a", "b")),
        ("a b\n1   2.5\n 3 -4\n5 6e3\n", ("a", "b")),
        ("# a b\n1 2.5\n3 -4\n5 6e3\n", ("a", "b")),
        ('"a, first","b"\n1,2.5\n3,-4\n\n5,6e3\n\n', ("a, first", "b")),
        ("a, a\n1, 2.5\n3, -4\n5, 6e3\n", ("a", "a.2")),
        ("a,\n1,2.5\n3,-4\n5,6e3\n", ("a", "column 2")),
    ],
    ids=[
        *("header", "no-header", "no-newline", "excel", "semicolon", "tab", "bar", "blanks"),
        *("savetxt", "quoted", "same-names", "no-name"),
    ],
)
def test_csv_dialects(tmp_path, text, columns):
    table = read_table(write(tmp_path, text))
    np.testing.assert_array_equal(table.values, ROWS)
    assert table.columns == columns


def test_one_column_of_csv(tmp_path):
    table = read_table(write(tmp_path, "x\n1\n2\n4\n"))
    assert table.columns == ("x",)
    np.testing.assert_array_equal(table.values, [[1], [2], [4]])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "uint16"])
def test_npy(tmp_path, dtype):
    rows = np.array([[1, 2], [3, 4], [5, 100]], dtype=dtype)
    np.save(tmp_path / "d.npy", rows[:, ::-1])
    table = read_table(tmp_path / "d.npy")
    np.testing.assert_array_equal(table.values, rows[:, ::-1])
    assert table.values.dtype == np.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
def test_pt(tmp_path, dtype):
    rows = torch.tensor([[1, 2], [3, 4], [5, 100]], dtype=dtype)
    torch.save(rows.requires_grad_(dtype is torch.float32), tmp_path / "d.pt")
    np.testing.assert_array_equal(read_table(tmp_path / "d.pt").values, rows.tolist())


def test_columns_are_chosen_by_name_and_number_and_text_elsewhere_is_no_matter(tmp_path):
    path = write(tmp_path, "id,a,b,kind\nx1,1,2,u\nx2,3,5,v\n")
    assert read_table(path, drop=["id", "kind"]).columns == ("a", "b")
    table = read_table(path, columns=["3", "a"])
    assert table.columns == ("b", "a")
    np.testing.assert_array_equal(table.values, [[2, 1], [5, 3]])


BAD_CSV = {
    "text": ("a,b\n1,2\n3,red\n", "row 2 (line 3), column 'b' holds the text 'red'"),
    "text-no-header": ("1,2\n\n3,red\n", "row 2 (line 3), column 'column 2' holds the text 'red'"),
    "empty-cell": ("a,b\n1,2\n3,\n", "row 2 (line 3), column 'b' is empty"),
    "missing": ("a,b\nNA,2\n3,4\n", "row 1 (line 2), column 'a' holds 'NA'"),
    "decimal-comma": ("a;b\n1,5;2\n3;4\n", "'1,5'; write decimals with a point"),
    "decimal-comma-everywhere": ("1,5;2,5\n3,5;4,5\n", "write decimals with a point"),
    "nan": ("a,b\n1,2\nnan,2\n3,4\n1,inf\n", "NaN or infinity in rows 2 and 4;"),
    "one-nan": ("a,b\n1,2\n-inf,2\n3,4\n", "NaN or infinity in row 2;"),
    "many-nan": ("a\n1\n" + "nan\n" * 9, "rows 2, 3, 4, 5, 6, 7 and 3 more;"),
    "overflow": ("a\n1\n1e999\n", "NaN or infinity in row 2"),
    "constant": ("a,b\n1,7\n2,7\n3,7\n", "column 'b' is constant (7 in all 3 rows)"),
    "ragged": ("a,b\n1,2\n1,2,3\n", "row 2 (line 3) has 3 cells and there are 2 columns"),
    "empty": ("", "is empty"),
    "blank": ("\n \n", "is empty"),
    "header-only": ("a,b\n", "a header and no rows"),
    "binary": (b"a,b\n1,\0\n", "binary data"),
    "latin1": ("a,größe\n1,2\n".encode("latin-1"), "not UTF-8"),
    "endless-quote": ('a,b\n1,"2\n' + "x" * 200_000, "cannot be read as CSV"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_is_named(tmp_path, case):
    text, words = BAD_CSV[case]
    with pytest.raises(InputError) as caught:
        read_table(write(tmp_path, text))
    message = str(caught.value)
    assert words in message
    assert "data.csv" in message
    assert message.endswith(".")
    assert "\n" not in message


BAD_NPY = {
    "one-dimensional": (np.arange(3.0), "reshape(-1, 1)"),
    "three-dimensional": (np.zeros((2, 2, 2)), "shape (2, 2, 2)"),
    "complex": (np.ones((2, 2), complex), "complex numbers"),
    "text": (np.array([["a", "b"]]), "holds <U1 values"),
    "bool": (np.eye(2, dtype=bool), "holds bool values"),
    "dates": (np.array([["2020-01-01"]], "datetime64[D]"), "datetime64"),
    "records": (np.zeros(3, dtype=[("a", float)]), "save an array of numbers"),
    "no-rows": (np.zeros((0, 3)), "there are no numbers"),
    "huge-integer": (np.array([[1, 2], [3, 2**53 + 2]]), "row 2, column 2 holds the whole number"),
    "nan": (np.array([[1.0], [np.nan]]), "NaN or infinity in row 2"),
    "constant": (np.array([[1.0, 2.0], [2.0, 2.0]]), "column 'column 2' is constant"),
}


@pytest.mark.parametrize("case", BAD_NPY)
def test_bad_npy_is_named(tmp_path, case):
    array, words = BAD_NPY[case]
    np.save(tmp_path / "d.npy", array)
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / "d.npy")
    assert words in str(caught.value)


def test_npy_of_objects_is_never_unpickled(tmp_path):
    np.save(tmp_path / "d.npy", np.array([[None]]), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects"):
        read_table(tmp_path / "d.npy")


class Objects:
    """Something that only an unsafe load would bring back."""


BAD_PT = {
    "dictionary": ({"x": torch.zeros(2, 2)}, "a dictionary (keys 'x')"),
    "list": ([1.0, 2.0], "holds a list"),
    "object": (Objects(), "Python objects"),
    "sparse": (torch.eye(3).to_sparse(), "to_dense"),
    "complex": (torch.ones(2, 2, dtype=torch.complex64), "complex numbers"),
    "one-dimensional": (torch.arange(3.0), "reshape(-1, 1)"),
}


@pytest.mark.parametrize("case", BAD_PT)
def test_bad_pt_is_named(tmp_path, case):
    content, words = BAD_PT[case]
    torch.save(content, tmp_path / "d.pt")
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / "d.pt")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["d.npy", "d.pt"])
@pytest.mark.parametrize("content", [b"garbage", b"\x93NUMPY\x01\x00v\x00{'descr'", b"PK\x03\x04"])
def test_damaged_files_are_named(tmp_path, name, content):
    with pytest.raises(InputError, match="is damaged or was not written by"):
        read_table(write(tmp_path, content, name))


def test_missing_files_and_strange_names(tmp_path):
    write(tmp_path, "1\n2\n", "points.csv")
    with pytest.raises(InputError, match=r"did you mean .*points\.csv\?"):
        read_table(tmp_path / "pionts.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_table(tmp_path)
    with pytest.raises(InputError, match=r"pycnf reads \.csv"):
        read_table(write(tmp_path, "1\n2\n", "book.xlsx"))


def test_unknown_columns_are_answered_with_the_nearest(tmp_path):
    path = write(tmp_path, "age,height\n1,2\n3,4\n")
    with pytest.raises(InputError, match=r"no column 'hieght' \(did you mean height\?\)"):
        read_table(path, columns=["hieght"])
    with pytest.raises(InputError, match="it has age and height"):
        read_table(path, drop=["3"])
    with pytest.raises(InputError, match="no column is left"):
        read_table(path, drop=["age", "height"])
    with pytest.raises(InputError, match="twice"):
        read_table(path, columns=["age", "1"])
