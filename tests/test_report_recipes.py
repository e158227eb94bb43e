import re

import pytest

from swalp import recipes
from swalp_command import cli


def run(capsys, *words):
    status = cli.run(["recipes", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list_names_every_recipe(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    for name in recipes.names():
        assert re.search(rf"^ {re.escape(name)} +\S", out, re.MULTILINE), name


def test_one_recipe_role_by_role(capsys):
    status, out, _ = run(capsys, "official-preresnet-6")
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["weight", "bfp6t[0]", "stochastic32", "6"] in rows
    assert ["activation", "bfp6t", "stochastic16", "6"] in rows
    assert ["second_moment", "float"] in rows
    assert ["placement", "nonlinearity"] in rows
    assert ["*", "Conv2d", "*", "placement", "output"] in rows
    assert ["error", "float"] in rows


def test_toml_is_the_recipe(capsys, tmp_path):
    _, out, _ = run(capsys, "mxfp6", "--toml")
    path = tmp_path / "my.toml"
    path.write_text(out)
    assert recipes.load(path) == recipes.get("mxfp6")
    status, shown, _ = run(capsys, str(path))
    assert status == 0
    assert "recipe mxfp6" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["papre-big-block-8"], "did you mean paper-big-block-8"),
        (["nosuch"], r"swalp: unknown recipe 'nosuch'; recipes: paper-big-block-8, .*mxfp4$"),
        (["paper"], "did you mean paper-big-block-8 or paper-small-block-8"),
        (["fixed-99"], r"the word length of fixed-W may be 4\.\.16"),
        (["none.toml"], r"none\.toml: No such file"),
        (["binary.toml"], r"binary\.toml: not UTF-8 text \(byte 4\)"),
        (["--toml"], "--toml needs a recipe"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"a = \xff")
    status, _, err = run(capsys, *words)
    assert status == 2
    assert re.search(message, err)
    assert len(err.splitlines()) == 1
