"""Options: precedence, refusals, and the way through a file and back."""

import os
import pickle

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from hpcavg.cli import parsers
from hpcavg.config.options import OPTIONS, SECTIONS, Config
from hpcavg.config.section import options_of
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.config.sources import from_sources
from hpcavg.errors import InputError, UsageError


def test_defaults_are_resolved():
    config = Config()
    assert (config.algorithm, config.k1, config.k2, config.epochs, config.steps) == ("hier_avg", 4, 32, 20, None)


def test_an_option_is_in_its_section_and_there_by_its_flat_name():
    config = Config(seed=3, consensus_distance=True, algorithm="eamsgd", momentum=0.5)
    assert (config.run.seed, config.seed) == (3, 3)
    assert config.averaging.measure_distance is config.consensus_distance is True
    assert (config.method.algorithm, config.problem.task, config.task) == ("eamsgd", "digits", "digits")
    assert (config.optimization.nesterov, config.faults.on_failure, config.checkpoints.resume) == (True, "abort", None)
    with pytest.raises(AttributeError, match="sed"):
        _ = config.sed
    with pytest.raises(TypeError, match="sed"):
        Config(sed=3)


def test_every_option_has_a_name_of_its_own_that_no_section_has():
    names = [option.name for section, owner in SECTIONS.items() for option in options_of(section, owner)]
    assert len(names) == len(set(names)) == len(OPTIONS)
    assert not OPTIONS.keys() & {*SECTIONS, *dir(Config)}


def test_every_default_passes_its_checks():
    for owner in SECTIONS.values():
        owner()


def test_a_configuration_travels_between_ranks():
    config = Config(algorithm="pr-sgd-hetero", local_steps="3,2", output="run")
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.rule().options["local_steps"] == (3, 2)
    assert again != Config(algorithm="pr-sgd-hetero", local_steps="3,1", output="run")


def test_a_section_is_checked_also_outside_a_configuration():
    assert AveragingOptions(check_rounds=3, seed=-1).check_rounds == 3
    for changes in ({"check_rounds": -1}, {"check_rounds": "3"}, {"buffers": None}, {"start": "rank1"}):
        with pytest.raises(InputError, match=next(iter(changes))):
            AveragingOptions(**changes)
    with pytest.raises(InputError, match="error_feedback=True: must be false without wire_dtype"):
        AveragingOptions(error_feedback=True)


def test_options_beat_the_file_and_the_file_beats_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('algorithm = "k-avg"\nk = 5\nlearning-rate = 0.5\nepochs = 3\n')
    config = parsers.parse_train(["--config", str(path), "--k", "7", "--steps", "9"])
    assert (config.algorithm, config.k, config.learning_rate, config.epochs, config.steps) == ("k_avg", 7, 0.5, None, 9)


def test_another_algorithm_drops_the_files_algorithm_options(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(Config(learning_rate=0.3).as_toml()))
    config = parsers.parse_train(["--config", str(path), "--algorithm", "k-avg"])
    assert (config.algorithm, config.k, config.k1, config.learning_rate) == ("k_avg", 8, None, 0.3)
    same = parsers.parse_train(["--config", str(path), "--algorithm", "hier-avg", "--k1", "2"])
    assert (same.k1, same.k2) == (2, 32)
    path.write_text("k1 = 2\nk = 5\n")
    assert parsers.parse_train(["--config", str(path), "--algorithm", "hier-avg"]).k1 == 2
    assert parsers.parse_train(["--config", str(path), "--algorithm", "k-avg"]).k == 5


def test_a_task_file_is_found_again_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert Config(task="mine.py:task").task == f"{tmp_path}/mine.py:task"


def test_the_resolved_configuration_can_be_fed_back(tmp_path):
    config = parsers.parse_train(
        ["--algorithm", "post-local-sgd", "--image-shape", "1x4x4", "--nesterov", "--steps", "5"]
    )
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config.as_toml()))
    assert from_sources(str(path), {}) == config


def test_options_of_several_kinds_come_back_from_the_file(tmp_path):
    for arguments in (
        "--algorithm pr-sgd-hetero --local-steps 9,9,3",
        "--algorithm pr-sgd-hetero --epoch-seconds 0.5",
        "--algorithm lupa --tau auto --mu 0.5",
        "--algorithm eamsgd --momentum 0.5 --num-servers 2",
    ):
        config = parsers.parse_train(arguments.split())
        path = tmp_path / "config.toml"
        path.write_text(tomli_w.dumps(config.as_toml()))
        assert from_sources(str(path), {}) == config
    assert (config.momentum, config.nesterov, config.servers_of(4)) == (0.5, True, 2)
    assert parsers.parse_train(["--algorithm", "downpour"]).servers_of(4) == 1
    assert parsers.parse_train(["--config", str(path), "--algorithm", "k-avg"]).momentum == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--algorithm fancy", "--algorithm fancy: must be one of sgd"),
        ("--k1 0", "--k1 0: must be an integer of at least 1"),
        ("--k1 64", "--k1 64: must be an integer of at least 1 and at most k2 = 32"),
        ("--k1 four", "--k1 four: must be an integer"),
        (f"--k1 {2**63}", f"--k1 {2**63}: must be an integer below 2^63"),
        ("--task a\0.py:f", "--task a\\x00.py:f: must be a text"),
        ("--output=", "--output : must be the name of a folder"),
        ("--algorithm unset", "--algorithm unset: must be one of sgd"),
        ("--weight-decay 1e39", "--weight-decay 1e+39: must be a number of at least 0 and below 1e8"),
        ("--algorithm slowmo --outer-lr 1e39", "--outer-lr 1e+39: must be a positive number below 1e+08"),
        ("--algorithm lupa --mu 1e-39", "--mu 1e-39: must be a number of at least 1e-15"),
        ("--k1 2.5", "--k1 2.5: must be an integer"),
        ("--algorithm k-avg --k1 4", "--k1 4: must be left out: k_avg takes only k"),
        ("--algorithm dasgd --tau 4 --delay 4", "--delay 4: must be an integer of at least 0 and below tau = 4"),
        ("--algorithm k-avg --num-servers 1", "--num-servers 1: must be 0 for k-avg"),
        ("--algorithm eamsgd --num-servers 0", "--num-servers 0: must be an integer of at least 1"),
        ("--algorithm eamsgd --optimizer adam", "--optimizer adam: must be sgd for eamsgd"),
        ("--algorithm lupa --mu 1 --schedule cosine", "--schedule cosine: must be constant: lupa sets"),
        ("--algorithm pr-sgd-time-varying --warmup-steps 3", "--warmup-steps 3: must be 0: pr-sgd-time-varying sets"),
        ("--algorithm lupa --tau many", "--tau many: must be an integer of at least 1, or auto"),
        ("--algorithm pr-sgd-hetero --local-steps 3,0", "--local-steps 0: must be an integer of at least 1"),
        ("--algorithm pr-sgd-hetero --local-steps fast", "--local-steps fast: must be a list of integers"),
        ("--learning-rate -1", "--learning-rate -1.0: must be a positive number below 1e30"),
        ("--learning-rate nan", "--learning-rate nan: must be a finite number"),
        ("--momentum 1", "--momentum 1.0: must be a number of at least 0 and below 1"),
        ("--nesterov --momentum 0", "--nesterov True: must be false where momentum is 0"),
        ("--batch-size 0", "--batch-size 0: must be an integer of at least 1"),
        ("--group-size 0", "--group-size 0: must be an integer of at least 1"),
        ("--epochs 1 --steps 1", "--steps 1: must be unset where epochs is given"),
        ("--decay-epochs 30,60", "--decay-epochs 30,60: must be unset with --schedule constant, or with"),
        ("--decay-steps 9 --schedule cosine", "--decay-steps 9: must be unset with --schedule cosine, or with"),
        ("--image-shape 3x32", "--image-shape 3x32: must be channels x height x width, as 3x32x32"),
        ("--image-shape 3xx2", "--image-shape 3xx2: must be sizes such as 3x32x32"),
        ("--check-rounds -1", "--check-rounds -1: must be an integer of at least 0"),
        ("--check-rounds 1 --algorithm downpour", "--check-rounds 1: must be 0 for downpour"),
        ("--non-finite ignore", "--non-finite ignore: must be one of exclude, stop"),
        ("--seed -1", "--seed -1: must be an integer of at least 0"),
        ("--algoritm k-avg", "--algoritm: no such option; near it: --algorithm"),
        ("--QQQQQQ", "--QQQQQQ: no such option; --help lists them"),
        ("trian", "trian: must be an option, or, as the first word, one of train, info, report, job, paper, data"),
        ("--k", "argument --k: expected one argument"),
        ("--config nowhere.toml", "--config nowhere.toml: must be a file that can be read"),
        ("--config /", "--config /: must be a file that can be read (Is a directory)"),
        ("--intended-learners 0", "--intended-learners 0: must be an integer of at least 1"),
    ],
)
def test_one_line_names_option_value_and_what_is_allowed(arguments, message):
    with pytest.raises(InputError) as caught:
        parsers.parse_train(arguments.split())
    assert caught.value.as_option().startswith(message)
    assert "\n" not in caught.value.as_option()


def test_an_option_of_the_file_is_taken_back_by_unset(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("algorithm = 'ada-lupa'\nalpha = 0.3\nsteps = 7\ngroup_size = 2\n")

    def options(text):
        config = parsers.parse_train(["--config", str(path), *text.split()])
        return config.alpha, config.rounds, config.steps, config.epochs, config.group_size

    assert options("") == (0.3, None, 7, None, 2)
    assert options("--alpha unset --rounds 5") == (None, 5, 7, None, 2)
    assert options("--group-size unset --epochs unset") == (0.3, None, 7, None, None)
    assert options("--steps unset") == (0.3, None, None, 20, 2)


def test_the_schedule_of_the_command_line_leaves_out_the_decays_of_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("schedule = 'step'\ndecay_epochs = [3]\n")
    assert parsers.parse_train(["--config", str(path), "--schedule", "step"]).decay_epochs == (3,)
    assert parsers.parse_train(["--config", str(path), "--schedule", "one-cycle"]).decay_epochs is None


def test_a_byte_order_mark_is_no_harm_and_an_option_twice_is(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfbatch-size = 3\r\n")
    assert from_sources(str(path), {}).batch_size == 3
    path.write_text("batch-size = 3\nbatch_size = 4\n")
    with pytest.raises(InputError, match="sets batch_size once"):
        from_sources(str(path), {})


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
positive = st.floats(0, 1e29, exclude_min=True)
valid = st.fixed_dictionaries(
    {},
    optional={
        "output": texts.filter(lambda text: text != "unset"),
        "image_shape": st.tuples(*[st.integers(1, 2**63 - 1)] * 3),
        "learning_rate": positive,
        "momentum": st.floats(0, 1, exclude_max=True),
        "weight_decay": st.floats(0, 1e8, exclude_max=True),
        "decay_factor": st.floats(0, 1, exclude_min=True),
        "flush_seconds": st.floats(0, allow_infinity=False),
        "seed": st.integers(0, 2**63 - 1),
        "expect_ranks": st.integers(1, 2**63 - 1),
        "intended_learners": st.integers(1, 2**63 - 1),
        "consensus_distance": st.booleans(),
        "schedule": st.sampled_from(["constant", "one-cycle", "one_cycle"]),
    },
)
algorithm = st.one_of(
    st.fixed_dictionaries({"algorithm": st.just("hier_avg"), "k1": st.integers(1, 9), "k2": st.integers(9, 2**63 - 1)}),
    st.fixed_dictionaries({"algorithm": st.just("dasgd"), "tau": st.integers(3, 99), "xi": st.floats(0, 0.99)}),
    st.fixed_dictionaries(
        {"algorithm": st.just("pr-sgd-hetero"), "local_steps": st.lists(st.integers(1, 2**40), min_size=1)}
    ),
    st.fixed_dictionaries({"algorithm": st.just("eamsgd"), "alpha": st.none() | st.floats(0.001, 0.999)}),
    st.fixed_dictionaries(
        {"algorithm": st.just("slowmo"), "beta": st.floats(0, 0.99), "outer_lr": st.floats(1e-9, 1e7)}
    ),
    st.fixed_dictionaries({"algorithm": st.just("ada_lupa"), "rounds": st.none() | st.integers(1, 99)}),
)


@given(valid, algorithm)
def test_every_configuration_comes_back_from_its_file(tmp_path_factory, options, rule):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    config = Config(**{**options, **rule})
    path.write_bytes(tomli_w.dumps(config.as_toml()).encode())
    assert from_sources(str(path), {}) == config


@pytest.mark.parametrize("name", ["seed", "config"])
def test_two_dashes_are_no_value(name):
    with pytest.raises(InputError) as caught:  # some versions of argparse make an empty list of them
        parsers.parse_train([f"--{name}=--"])
    assert f"--{name}" in caught.value.as_option()


def test_an_unknown_option_in_a_file_lists_the_valid_ones(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("learning_rat = 0.1\n")
    with pytest.raises(InputError, match=r"'learning_rat' is none of algorithm, .*learning_rate, ") as caught:
        from_sources(str(path), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["k1 = [", "k1 = 1.5", 'learning_rate = "fast"', "nesterov = 1", "task = 3", "[k]\nk1=1"]
)
def test_files_with_wrong_values_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        from_sources(str(path), {})
    assert "\n" not in caught.value.as_option()


def test_input_errors_travel_between_ranks():
    for error in (InputError("k", 0, "1"), UsageError("no such option")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert again.as_option() == error.as_option()


def test_another_algorithms_options_do_not_come_along_under_the_same_name(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(Config(algorithm="slowmo").as_toml()))
    assert parsers.parse_train(["--config", str(path), "--algorithm", "diloco"]).outer_lr == 0.7
    path.write_text("algorithm = 'pr-sgd-hetero'\nlocal_steps = [3, 4.7]\n")
    with pytest.raises(InputError, match="local_steps"):
        parsers.parse_train(["--config", str(path)])


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_a_run_to_resume_whose_options_cannot_be_read_is_named(tmp_path, make):
    make(tmp_path / "config.toml")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError) as caught:
        from_sources(None, {"resume": str(tmp_path)})
    assert caught.value.as_option().startswith(f"--config {tmp_path}/config.toml: must be a file that can be read (")


@pytest.mark.parametrize(
    ("options", "ranks", "per_rank"),
    [
        ({}, 4, 1),
        ({"learners_per_rank": 3}, 4, 3),
        ({"learners": 8}, 4, 2),
        ({"learners": 8, "learners_per_rank": 2}, 4, 2),
        ({"learners": 4}, 4, 1),
    ],
)
def test_learners_of_a_rank(options, ranks, per_rank):
    assert Config(**options).learners_of_rank(ranks) == per_rank


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"learners": 6}, "learners=6: must be a multiple of 4, the number of ranks with learners"),
        ({"learners": 2}, "learners=2: must be a multiple of 4, the number of ranks with learners"),
        (
            {"learners": 8, "learners_per_rank": 1},
            "learners_per_rank=1: must be 2 or unset: --learners 8 on 4 ranks",
        ),
        (
            {"learners_per_rank": 2, "algorithm": "downpour"},
            "learners_per_rank=2: must be 1 with downpour on 4 ranks: servers are simulated on one rank alone",
        ),
        ({"learners": 8, "precision": "fp16"}, "learners_per_rank=2: must be 1 with precision=fp16"),
        ({"learners": 8, "compile": True}, "learners_per_rank=2: must be 1 with compile=True"),
        ({"learners": 8, "channels_last": True}, "learners_per_rank=2: must be 1 with channels_last=True"),
    ],
)
def test_learners_that_do_not_fit_the_ranks(options, line):
    config = Config(**options)  # the number of ranks is not known yet
    with pytest.raises(InputError) as error:
        config.learners_of_rank(4)
    assert str(error.value) == line


def test_one_rank_with_several_learners_simulates_servers():
    for options in ({"learners": 8}, {"learners_per_rank": 8}, {"learners": 8, "num_servers": 0}):
        config = Config(algorithm="eamsgd", step_times="slow:2", **options)
        assert (config.servers_of(1), config.learners_of_rank(1)) == (0, 8)
    assert Config(algorithm="eamsgd", learners=8).servers_of(9) == 1  # ranks enough for one learner each
    assert Config(algorithm="eamsgd", learners=8).learners_of_rank(9) == 1
    assert Config(algorithm="k-avg", learners=8).servers_of(1) == 0
    with pytest.raises(InputError, match="num_servers=0: must be an integer of at least 1"):
        Config(algorithm="downpour", num_servers=0)
    for options in ({"algorithm": "k-avg", "learners": 8}, {"algorithm": "downpour", "num_servers": 1, "learners": 8}):
        with pytest.raises(InputError, match="step_times='slow:2': must be constant, unless"):
            Config(step_times="slow:2", **options)


def test_step_times_of_a_file_do_not_count_for_an_algorithm_without_servers(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text('algorithm = "downpour"\nlearners = 8\nstep_times = "slow:2"\n')
    assert from_sources(str(path), {}).step_times == "slow:2"
    assert from_sources(str(path), {"algorithm": "k-avg"}).step_times == "constant"
