import json


def test_it(run, paid, tmp_path, capsys):
    for flags in (
        [],
        ["--sample_policy", "true"],
        ["--sample_policy", "true", "--words_per_assertion", "3.5"],
    ):
        out = tmp_path / "e.json"
        run(
            "estimate",
            [
                *paid.arguments,
                "--run_dir",
                str(tmp_path / "run"),
                "--model.judge.cache",
                str(tmp_path / "c.sqlite"),
                "--chars_per_token",
                "4",
                "--json",
                str(out),
                *flags,
            ],
        )
        d = json.loads(out.read_text())
        with capsys.disabled():
            print(flags)
            f = {r["task"]: (r["calls"], r["tokens_in"], r["tokens_out"]) for r in d["tasks"]}
            for t, v in paid.tasks.items():
                print(t, v, f.get(t), [round(a / b, 2) for a, b in zip(f[t], v)])
            for c in range(3):
                print([round(sum(x[c] for x in f.values()) / sum(x[c] for x in paid.tasks.values()), 3)])
            print(d["uncertainty"], d["total"], paid.usd)
    with capsys.disabled():
        print(capsys.readouterr().out)
