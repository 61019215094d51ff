"""Pages of runs: every number is that of the log, nothing is loaded, hostile text stays text."""
import json
from html.parser import HTMLParser

import pytest

import loop

SMALL = loop.SMOKE | dict(preset="smoke", threads=1, workers=1, questions=8, samples=2, budget=200,
                          steps=1, base_steps=2, eval_questions=8, max_tokens=24)


def numbers(html):
    """The attributes of each <data> of a page. No tag of it is a script."""
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(html)
    assert "script" not in dict(found)
    return [attributes for tag, attributes in found if tag == "data"]


@pytest.mark.parametrize("recipe", ["self_explore", "alphallm", "sft"])
def test_report(recipe, tmp_path, capsys):
    """Each number equals the log's. Three trees unfold; the text of a model cannot leave them."""
    log = loop.run(loop.Settings(**SMALL, recipe=recipe, out=str(tmp_path / "run")))
    assert numbers((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    for file in (tmp_path / "run").glob("*_1/*.jsonl"):
        evil = "</pre><script>1</script>\ud800\0\x1b[2J"
        loop.write_lines(file, [row | dict(step_texts=[evil] * len(row["nodes"]))
                                for row in loop.read_lines(file)])
    task = loop.Homework(loop.Settings(**SMALL), None)
    html, calibration, keys = loop.report_page(tmp_path / "run", task), [], set()
    for number in numbers(html):
        key, value = number["data-key"], json.loads(number["value"])
        keys.add(key)
        if "data-said" in number:
            calibration.append((key, float(number["data-said"]), value))
        else:
            row = log[int(number["data-round"])]
            for name in key.split("."):         # critic.value.auc is row["critic"]["value"]["auc"]
                row = row[name]
            assert row == value
    heads = log[-1].get("critic", {}).items()
    assert calibration == [(f"critic.{head}.calibration", said, true)
                           for head, found in heads for said, true, _ in found["calibration"]]
    assert {"accuracy", "sound", "sampled_tokens", "learn_seconds"} <= keys
    assert html.count("<details>") == (0 if recipe == "sft" else 3)
    assert all(c.isprintable() or c == "\n" for c in html) and "prefers-color-scheme" in html
    assert not any(word in html for word in ("http", "src=", "href=", "url(", "@import"))


def test_compare_page():
    """Means over seeds, and differences to the first recipe; one seed has no interval."""
    rates = {"rft": [0.5, 0.7, 0.6], "mine": [0.6, 0.7, 0.95]}
    rows = [dict(recipe=name, seed=seed, round=r, accuracy=rates[name][seed] * r, sound=None)
            for seed in range(3) for name in rates for r in (0, 1)]
    for count, expected in ((12, [0, 0.6, 0, 0.75, 0, 0, 0, 0.15]),
                            (4, [0, 0.5, 0, 0.6, 0, 0, 0, 0.1])):
        html = loop.compare_page(rows[:count])
        assert [float(number["value"]) for number in numbers(html)] == pytest.approx(expected)
        assert html.count("<svg") == 2 and "sound" not in html
