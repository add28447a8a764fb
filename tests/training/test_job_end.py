"""The job around a step, without a model (support/job_setting.py): skipped steps, saves that fail,
the report, and speeds.
"""

import json
import types

import jax
import pytest
from support.job_setting import LOGGED, REPORT, STEPS, Setting

from ttt_jax.errors import TrainingError
from ttt_jax.training import job as job_module
from ttt_jax.training import throughput as throughput_module
from ttt_jax.training.guard import Guard
from ttt_jax.training.hooks import Hook, Seen
from ttt_jax.training.recovery import Recovery
from ttt_jax.training.saver import Saver
from ttt_jax.training.throughput import Throughput


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path)


# --------------------------------------------------------------------------- skipped steps, retries


def test_a_roll_back_takes_older_weights_and_goes_on_with_the_data(tmp_path, monkeypatch):
    setting = Setting(tmp_path, skipped=[5, 6])

    def note(owner, name):
        call = getattr(owner, name)

        def noted(*args):
            setting.calls.append(name)
            return call(*args)

        monkeypatch.setattr(owner, name, noted)

    note(Saver, "settle")
    note(Recovery, "roll_back")
    note(Guard, "rolled_back")
    with setting.open() as job:
        state, dues = setting.train(job)
    assert [step for step, due in dues.items() if due.roll_back] == [6], "known at a logged step"
    calls = [call for call in setting.calls if call not in ("lock", "probe")]
    assert calls == ["fresh", "place", "settle", "roll_back", "rolled_back"]
    assert setting.calls.index("rolled_back") < setting.calls.index("probe")
    sixth = next(row for row in setting.rows if row["step"] == 6)
    assert sixth["probe/gain"] == 10, "of the weights of step 4"
    assert float(state.model["w"]) == sum(range(1, STEPS + 1)) - 5 - 6
    assert setting.loader.batches == STEPS


def test_no_checkpoint_is_made_among_skipped_steps(tmp_path):
    setting = Setting(tmp_path, skipped=[8])
    with setting.open() as job:
        setting.train(job)
    assert setting.saved == [4, 12, 13]
    assert setting.steps_with("loss") == LOGGED


def test_a_failed_save_is_tried_again_where_a_step_is_logged(setting, monkeypatch):
    asked, saved = [], []

    def retry_due(self):
        asked.append(job.step)
        return True

    monkeypatch.setattr(Saver, "retry_due", retry_due)
    monkeypatch.setattr(Saver, "save", lambda self, step, *what: saved.append(step))
    monkeypatch.setattr(Saver, "save_surely", lambda self, step, *what, **how: saved.append(step))
    with setting.open() as job:
        setting.train(job)
    assert asked == [3, 6, 9], "not where a save is due anyway"
    assert saved == [3, 4, 6, 8, 9, 12, 13]


# ---------------------------------------------------------------------------------------------- end


def test_compiled_programs_are_sealed_after_the_first_step_and_the_evaluation(setting, monkeypatch):
    sealed = []
    cache = types.SimpleNamespace(seal=lambda: sealed.append(job.step))
    monkeypatch.setattr(job_module, "open_cache", lambda config: (cache, []))
    with setting.open() as job:
        state, _ = setting.train(job)
        assert sealed == [0, 2, 6], "the step is under way; the first call of each hook"
        assert job.closing_evaluation(state.model) == REPORT
    assert sealed == [0, 2, 6, STEPS]


def test_the_report_makes_a_run_a_finished_one(setting, capsys):
    with setting.open() as job:
        state, _ = setting.train(job)
        by_position = job.closing_evaluation(state.model)
        assert not (setting.run_dir / "report.json").exists()
    setting.calls.clear()
    job.report(by_position)
    assert setting.calls == ["lock"]
    report = json.loads((setting.run_dir / "report.json").read_text())
    assert report["steps"] == STEPS
    assert report["heldout"]["ttt_on"] == REPORT["ttt_on"]
    assert (report["loss_first"], report["loss_last"]) == (1, 13)
    assert report["tokens_per_second"] == job._throughput.mean > 0
    assert "evaluating held-out loss by position" in capsys.readouterr().out


def test_what_the_last_step_has_measured_is_not_measured_again(setting, capsys):
    """Both evaluations take minutes with a large model."""
    seen = {"positions": [[0, 64]], "ttt_on": [1.0], "ttt_off": [2.0]}
    setting.heldout.measured = {STEPS: seen}.get
    with setting.open() as job:
        state, _ = setting.train(job)
        assert job.closing_evaluation(state.model) is seen
    assert "evaluating held-out loss by position" not in capsys.readouterr().out


def test_a_report_after_a_restart_takes_its_speed_from_the_curve(setting):
    with setting.open() as job:
        setting.train(job)
    speed = [row["tokens_per_second"] for row in setting.rows if "tokens_per_second" in row][-1]
    again = Setting(setting.run_dir.parents[1])
    with again.open() as job:
        state, dues = again.train(job)
        assert not dues
        by_position = job.closing_evaluation(state.model)
    job.report(by_position)
    report = json.loads((setting.run_dir / "report.json").read_text())
    assert report["tokens_per_second"] == speed


def test_no_report_is_written_into_a_folder_that_is_gone(setting):
    def gone():
        raise TrainingError("gone")

    with setting.open() as job:
        state, _ = setting.train(job)
        by_position = job.closing_evaluation(state.model)
    setting.lock.check = gone
    with pytest.raises(TrainingError, match="gone"):
        job.report(by_position)
    assert not (setting.run_dir / "report.json").exists()


def test_what_is_measured_beside_the_steps_is_no_training_time(setting, monkeypatch):
    now = [0.0]

    def takes(seconds):
        now[0] += seconds

    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput_module, "time", fake)
    setting.hooks = [Hook(2, lambda step, model: takes(1000) or Seen({}))]
    with setting.open() as job:
        setting.train(job, before=lambda step: takes(2))
    speeds = [row["tokens_per_second"] for row in setting.rows if "tokens_per_second" in row]
    assert speeds == [2 * 128 / 2] * len(LOGGED[1:])


def test_throughput(setting, monkeypatch):
    """The first interval compiles, and what lies between an interval and the next is no step."""
    now = [100.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput_module, "time", fake)
    monkeypatch.setattr(throughput_module, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(throughput_module, "model_flops_per_token", lambda *args, **kw: 1e6)
    throughput = Throughput(setting.config, 7)
    now[0] += 50
    assert throughput.scalars(8) == {}
    assert throughput.mean is None
    now[0] += 1000  # an evaluation
    throughput.restart(8)
    now[0] += 4
    tokens = 2 * 128
    share = pytest.approx(2 * tokens * 1e6 / 4 / (1e9 * jax.device_count()))
    assert throughput.scalars(10) == {"tokens_per_second": 2 * tokens / 4, "mfu": share}
    throughput.restart(10)
    now[0] += 1
    throughput.scalars(11)
    assert throughput.mean == 3 * tokens / 5
