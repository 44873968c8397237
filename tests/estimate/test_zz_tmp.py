from tests.estimate.test_estimate_run import _estimate,_figures,_sums
def test_show(run,paid,tmp_path,capsys):
    with capsys.disabled():
        print(paid.tasks)
    for name,flags in (("plain",()),("sample",("--sample_policy","true")),("sample32",("--sample_policy","true","--rows","8")),("plain8",("--rows","8")),("ledger",("--ledger",str(paid.run/"judge_ledger.sqlite")))):
        f=_figures(_estimate(run,paid,tmp_path,*flags))
        with capsys.disabled():
            print("\n==",name)
            for t in paid.tasks: print(f"{t:10s}",*[f"{a/b-1:+.1%}" for a,b in zip(f[t],paid.tasks[t])])
            print("total     ",*[f"{a/b-1:+.1%}" for a,b in zip(_sums(f),_sums(paid.tasks))])
