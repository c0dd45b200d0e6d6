"""Classification: rows and their guards, scores against scikit-learn, the order of classes, pairs, padding, and training."""

import copy
import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef

from tests.conftest import ROOT, pico
from tests.unit.reviews import rows, write_bert, write_rows
from winnow.calibration.statistics import collect
from winnow.checkpoint.loading import load_model
from winnow.data.examples import encode_rows, padding_of, takes_types
from winnow.data.rows import check_rows, read_task, shared_rows
from winnow.data.tokens import PAD, load_tokenizer
from winnow.errors import InputError
from winnow.evaluation.classification import scores
from winnow.evaluation.classification_table import COLUMNS, classification_table
from winnow.evaluation.kinds.classification import Classification
from winnow.evaluation.predictions import outputs_of_classes, predict_classes
from winnow.io.resume import Resume
from winnow.models.architectures import matrices_of
from winnow.planning.config import load
from winnow.planning.plan import Plan
from winnow.training.finetune import _rows_of_step, load_base, train_classifier, write_tuned
from winnow.training.options import Tuning


def spec(folder, train_rows, test_rows, **options):
    """The resolved rows of a task whose files are written below `folder`."""
    files = {name: [write_rows(folder / f"{name}.jsonl", part)] for name, part in (("train", train_rows), ("test", test_rows))}
    return Classification.Options(**{"kind": "classification", "columns": ["sentence"], **files, **options}).rows()


def labelled(*pairs):
    return [{"sentence": text, "label": label} for text, label in pairs]


TRAIN, TEST = labelled(("a b", 0), ("c d", 1), ("e f", 1)), labelled(("g h", 1), ("i j", 0))


def test_all_formats_give_the_same_rows(tmp_path):
    want, facts = read_task(spec(tmp_path, TRAIN, TEST))
    assert facts["labels"] == ["0", "1"]
    assert facts["rows"] == {"train": 3, "test": 2}
    for name, part in (("train", TRAIN), ("test", TEST)):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        pd.DataFrame(part).to_parquet(tmp_path / f"{name}.parquet")
        with open(tmp_path / f"{name}.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, ["sentence", "label"])
            writer.writeheader()
            writer.writerows(part)
    for ending in ("json", "parquet", "csv"):
        files = {name: [str(tmp_path / f"{name}.{ending}")] for name in ("train", "test")}
        found, other = read_task(Classification.Options(kind="classification", columns=["sentence"], **files).rows())
        assert other == facts, ending
        for split in found:
            pd.testing.assert_frame_equal(found[split], want[split])


def test_classes_are_numbered_as_the_preset_or_the_files_say(tmp_path):
    named = [labelled(("a", "no"), ("b", "yes"), ("c", "maybe")), labelled(("d", "yes"))]
    tables, facts = read_task(spec(tmp_path, *named))
    assert facts["labels"] == ["maybe", "no", "yes"]
    assert tables["train"]["label"].tolist() == [1, 2, 0]
    tables, facts = read_task(spec(tmp_path, *named, labels=["yes", "maybe", "no"]))
    assert tables["train"]["label"].tolist() == [2, 0, 1]
    assert tables["test"]["label"].tolist() == [0]
    tables, facts = read_task(spec(tmp_path, TRAIN, TEST, labels=["not_equivalent", "equivalent"]))
    assert (tables["train"]["label"].tolist(), facts["labels"]) == ([0, 1, 1], ["not_equivalent", "equivalent"])


def test_a_hub_data_set_is_read_by_its_splits_and_names_its_classes(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    splits = {"train": TRAIN, "validation": TEST}
    asked = []

    def load_dataset(name, subset, split, revision):
        asked.append((name, subset, split, revision))
        return datasets.Dataset.from_list(splits[split], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"dataset": "nyu-mll/glue", "subset": "sst2", "revision": "b" * 40}
    tables, facts = read_task(Classification.Options(kind="classification", columns=["sentence"], **hub).rows())
    assert asked == [("nyu-mll/glue", "sst2", s, "b" * 40) for s in ("train", "validation")]
    assert facts["labels"] == ["neg", "pos"]
    assert tables["test"]["label"].tolist() == [1, 0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(
        InputError, match=r"nyu-mll/glue, train: not cached, and cannot be downloaded .no route.; run `snakemake pref"
    ):
        read_task(Classification.Options(kind="classification", columns=["sentence"], **hub).rows())


@pytest.mark.parametrize(
    ("train_rows", "test_rows", "options", "message"),
    [
        (TRAIN, labelled(("x", 0), ("C  D", 1)), {}, r"row 1 of train is also row 1 of test \('c d'\), and 1 train rows are"),
        (TRAIN, labelled(("x", -1)), {}, r"test, row 0: -1 is not a class \(0, 1\); GLUE's own `test` has no labels"),
        (TRAIN, labelled(("x", 3.8)), {}, r"test, row 0: 3.8 is not a class .* regression"),
        (TRAIN, labelled(("x", 2)), {}, r"test, row 0: 2 is not a class \(0, 1\)"),
        (TRAIN, labelled(("x", "pos")), {"labels": ["good", "bad"]}, r"'pos' is not a class \(good, bad\)"),
        ([*TRAIN, {"sentence": " ", "label": 0}], TEST, {}, r"train, row 3: no text in column 'sentence', but ' '"),
        ([*TRAIN, {"text": "a", "label": 0}], TEST, {}, r"train, row 3: there is no column 'sentence'; it has text, label"),
        ([{"text": "a", "label": 0}], TEST, {}, r"train, row 0: there is no column 'sentence'"),
        (TRAIN, [], {}, "test: there are no rows"),
        (TRAIN[1:], labelled(("x", 1)), {"labels": ["no", "yes"]}, "train has no row of class 'no'"),
        (labelled(("a", 0)), labelled(("x", 0)), {}, "train has a single class"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path, train_rows, test_rows, options, message):
    with pytest.raises(InputError, match=message):
        read_task(spec(tmp_path, train_rows, test_rows, **options))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"sentence": "a \\udc00", "label": 0}\n',
            r"train, row 0: column 'sentence' contains \\udc00, a lone surrogate, which is not a character; fix the text",
        ),
        (
            "a.jsonl",
            '{"sentence": "a", "label": 0}\n{"sentence": ' + "[" * 10**5 + "]" * 10**5 + "}\n",
            r"train: .*a\.jsonl: not readable as jsonl rows \(line 2: nested too deep to be read\)",
        ),
        ("a.json", "[" * 10**5, r"a\.json: not readable as json rows \(nested too deep to be read\)"),
        ("a.json", '[{"sentence": "a", "label": 0, "label": 1}]', r"a\.json: .*\(duplicate key 'label' in an object\)"),
        ("a.jsonl", "\n3\n", r"a\.jsonl: not readable as jsonl rows \(line 2: an object is needed, not int\)"),
        (
            "a.csv",
            "sentence,label\na,0\none, two,1\n",
            r"a\.csv: .*\(row 1 has more fields than the header; quote texts that contain a comma",
        ),
    ],
    ids=["half a pair", "deep jsonl", "deep json", "twice", "no object", "commas"],
)
def test_files_that_hold_no_rows_are_refused_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    task = {**spec(tmp_path, TRAIN, TEST), "train": [str(tmp_path / name)]}
    with pytest.raises(InputError, match=message) as caught:
        read_task(task)
    assert "\n" not in str(caught.value)


def test_shared_rows_are_dropped_from_training_where_that_is_asked_for(tmp_path):
    shared = labelled(("x", 0), ("C  D", 1))
    tables, facts = read_task(spec(tmp_path, TRAIN, shared, shared_rows="drop"))
    assert tables["train"]["text"].tolist() == ["a b", "e f"]
    assert len(tables["test"]) == 2
    assert facts["dropped"] == 1
    assert not shared_rows(tables["train"], tables["test"])
    pair = pd.DataFrame({"text": ["a", "b"], "pair": ["c", "d"], "label": [0, 1]})
    assert shared_rows(pair, pd.DataFrame({"text": ["D"], "pair": ["b"], "label": [1]})) == {1: 0}, "in either order"
    assert not shared_rows(pair, pd.DataFrame({"text": ["a"], "pair": ["d"], "label": [0]}))


def test_a_calibration_text_that_holds_test_rows_is_refused():
    test = pd.DataFrame({"text": [f"row {i}" for i in range(100)], "label": [0] * 100})
    assert check_rows(["Row  3", "something else"], test, ("c", "t"))["common_rows"] == 1
    with pytest.raises(InputError, match="calibration text c contains row 3 of the test rows t, and 2 of 100 in total"):
        check_rows(["row 3", "row 7"], test, ("c", "t"))


def random_outputs(seed, count=200, classes=2, right=0.8):
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=count)
    predicted = np.where(draw.random(count) < right, labels, draw.integers(classes, size=count))
    return labels.tolist(), {"predicted": predicted.tolist(), "loss": draw.exponential(size=count).tolist()}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.floats(0.0, 1.0))
def test_scores_are_scikit_learns(seed, classes, right):
    labels, own = random_outputs(seed, 60, classes, right)
    found = scores(labels, own, classes)
    accuracy = accuracy_score(labels, own["predicted"])
    assert found["accuracy"]["value"] == pytest.approx(accuracy)
    assert found["accuracy"]["value_se"] == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 59))
    assert set(found) == {"accuracy", "loss", *(("f1", "matthews") if classes == 2 else ())}
    if classes == 2:
        assert found["f1"]["value"] == pytest.approx(f1_score(labels, own["predicted"], zero_division=0.0))
        assert found["matthews"]["value"] == pytest.approx(matthews_corrcoef(labels, own["predicted"]))


def test_standard_errors_are_the_jackknife_over_rows_one_by_one():
    labels, own = random_outputs(1, 40)
    dense = {"predicted": [p if i % 5 else 1 - p for i, p in enumerate(own["predicted"])], "loss": own["loss"]}
    found = scores(labels, own, 2, dense)
    y, a, b = np.array(labels), np.array(own["predicted"]), np.array(dense["predicted"])
    for name, of in {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}.items():
        for what, statistic in {
            "value": lambda k, f=of: f(y[k], a[k]),
            "delta": lambda k, f=of: f(y[k], a[k]) - f(y[k], b[k]),
        }.items():
            without = np.array([statistic(np.delete(np.arange(40), i)) for i in range(40)])
            error = np.sqrt(39 / 40 * ((without - without.mean()) ** 2).sum())
            assert found[name][what] == pytest.approx(statistic(np.arange(40))), (name, what)
            assert found[name][f"{what}_se"] == pytest.approx(error), (name, what)
    assert found["agreement"]["value"] == pytest.approx(0.8)
    with pytest.raises(InputError, match="scored on other rows"):
        scores(labels, own, 2, {"predicted": [0], "loss": [0.0]})


def test_a_model_beside_itself_differs_by_nothing():
    labels, own = random_outputs(3)
    found = scores(labels, own, 2, own)
    assert {score[key] for score in found.values() for key in ("delta", "delta_se") if key in score} == {0.0}
    assert found["agreement"] == {"value": 1.0, "value_se": 0.0}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def classifier(bert):
    return load_base(bert, ["bad", "good"], load_tokenizer(bert), 0, "cpu").eval()


def table(count=12, seed=0, pair=False):
    content = pd.DataFrame(rows(count, seed, pair)).rename(columns={"sentence": "text", "other": "pair"})
    return content[["text", *(["pair"] if pair else []), "label"]]


def test_pairs_are_encoded_and_cut_as_the_tokenizer_does(bert):
    tokenizer = load_tokenizer(bert)
    examples = encode_rows(tokenizer, table(pair=True), 14)
    assert max(map(len, examples.ids)) == 14
    for i, row in table(pair=True).iterrows():
        want = tokenizer(row["text"], row["pair"], truncation=True, max_length=14)
        assert examples.ids[i] == want["input_ids"]
        assert examples.types[i] == want["token_type_ids"]
        assert {0, 1} == set(examples.types[i])
    given = examples.batch([0, 3], 0, True, "cpu")
    assert given["attention_mask"].sum(1).tolist() == [len(examples.ids[0]), len(examples.ids[3])]


def test_predictions_are_those_of_single_rows_whatever_the_batch(classifier, bert):
    examples = encode_rows(load_tokenizer(bert), table(pair=True), 24)
    alone = predict_classes(classifier, examples, [0, 1], 1)
    for i in range(len(examples.ids)):
        with torch.no_grad():
            ids, types = torch.tensor([examples.ids[i]]), torch.tensor([examples.types[i]])
            logits = classifier(input_ids=ids, token_type_ids=types).logits.double()
        assert alone["predicted"][i] == int(logits.argmax())
        want = log_loss([int(examples.labels[i])], logits.softmax(1).numpy(), labels=[0, 1])
        assert alone["loss"][i] == pytest.approx(want, rel=1e-9)
    together = predict_classes(classifier, examples, [0, 1], 7)
    assert together["predicted"] == alone["predicted"]
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    turned = predict_classes(classifier, examples, [1, 0], 7)
    assert turned["predicted"] == [1 - p for p in together["predicted"]], "outputs stand for classes"


def test_outputs_are_matched_by_name_where_both_have_names(classifier):
    assert outputs_of_classes(classifier, ["bad", "good"]) == [0, 1]
    assert outputs_of_classes(classifier, ["good", "bad"]) == [1, 0]
    assert outputs_of_classes(classifier, ["0", "1"]) == [0, 1]
    assert outputs_of_classes(pico("bert_classifier"), ["x", "y", "z"]) == [0, 1, 2], "LABEL_0 is no name"
    with pytest.raises(InputError, match="the model's outputs are named bad, good, but the task's classes no, yes"):
        outputs_of_classes(classifier, ["no", "yes"])
    with pytest.raises(InputError, match=r"the model has 2 outputs .*, but the task has 3"):
        outputs_of_classes(classifier, ["a", "b", "c"])
    with pytest.raises(InputError, match="BertForMaskedLM has no classification head"):
        outputs_of_classes(pico("bert_masked"), ["a", "b"])


def test_a_logit_that_is_not_finite_is_named(classifier, bert):
    broken = copy.deepcopy(classifier)
    examples = encode_rows(load_tokenizer(bert), table(), 24)
    token = examples.ids[5][1]
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight[token] = float("nan")
    first = next(i for i in sorted(range(12), key=lambda i: len(examples.ids[i])) if token in examples.ids[i])
    with pytest.raises(FloatingPointError, match=f"logits are not finite for row {first} of test"):
        predict_classes(broken, examples, [0, 1], 1)


def test_statistics_of_rows_are_those_of_their_tokens_alone(classifier, bert):
    """Padded windows with types, against every row by itself."""
    tokenizer = load_tokenizer(bert)
    examples = encode_rows(tokenizer, table(pair=True), 24)
    ids, types = map(torch.from_numpy, examples.windows(9, 3, PAD))
    chosen = [i for i in range(12) if any(ids[row][ids[row] >= 0].tolist() == examples.ids[i] for row in range(9))]
    assert len(chosen) == 9
    state = {name: {"shape": list(tensor.shape)} for name, tensor in classifier.state_dict().items()}
    matrices = matrices_of("bert", state)
    found = dict(collect(classifier, matrices, ids, 4, torch.float64, types=types))
    seen = {}
    hook = classifier.bert.encoder.layer[1].output.dense.register_forward_pre_hook(
        lambda _m, args: seen.setdefault("x", []).append(args[0][0].double())
    )
    with torch.no_grad():
        for i in chosen:
            classifier.bert(torch.tensor([examples.ids[i]]), token_type_ids=torch.tensor([examples.types[i]]))
    hook.remove()
    x = torch.cat(seen["x"])
    got = found[1]["ffn_hidden"]
    assert int(got["count"]) == len(x) == sum(len(examples.ids[i]) for i in chosen)
    torch.testing.assert_close(got["gram"], x.T @ x / len(x), rtol=1e-5, atol=1e-8)
    with pytest.raises(InputError, match="there are 12 train rows, but 13 windows are requested"):
        examples.windows(13, 0, PAD)


def test_every_pass_has_all_rows_once_in_an_order_of_its_own():
    steps = [_rows_of_step(step, 4, 10, 5) for step in range(5)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert steps == [_rows_of_step(step, 4, 10, 5) for step in range(5)]
    assert steps != [_rows_of_step(step, 4, 10, 6) for step in range(5)]


def test_the_rate_rises_and_falls_and_steps_follow_from_epochs():
    tuning = Tuning(task="t", rate=1.0, warmup=0.2, epochs=2, batch=10)
    assert tuning.total_steps(101) == 21
    assert [round(tuning.rate_at(step, 10), 3) for step in range(10)] == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert Tuning(task="t", steps=7).total_steps(1000) == 7


@pytest.fixture(scope="module")
def tuned(bert, tmp_path_factory):
    """(folder of the tuned model, its report, the tokenizer, test rows)"""
    tokenizer, folder = load_tokenizer(bert), tmp_path_factory.mktemp("tuned") / "model"
    model = load_base(bert, ["bad", "good"], tokenizer, 0, "cpu")
    options = Tuning(task="t", steps=100, batch=32, rate=2e-3)
    report = train_classifier(model, encode_rows(tokenizer, table(500), 24), [0, 1], options)
    write_tuned(folder, model, bert, [p.name for p in bert.iterdir()])
    return folder, report, tokenizer, table(200, seed=1)


def test_a_task_is_learned_and_the_directory_is_the_model(tuned):
    folder, report, _, test = tuned
    assert report["steps"] == 100
    assert report["last_loss"] < 0.5 * report["first_loss"]
    model = load_model(folder, "float32", "cpu")
    assert model.config.id2label == {0: "bad", 1: "good"}
    examples = encode_rows(load_tokenizer(folder), test, 24)
    found = scores(examples.labels.tolist(), predict_classes(model, examples, [0, 1], 32), 2)
    assert found["accuracy"]["value"] > 0.85


def test_training_that_was_cut_off_goes_on_to_the_same_bits(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("WINNOW_SAVE_SECONDS", "0")
    monkeypatch.setattr("winnow.io.resume.SHARE", 0)
    tokenizer = load_tokenizer(bert)
    examples, options = encode_rows(tokenizer, table(40), 24), Tuning(task="t", steps=6, batch=8, rate=1e-3)

    def trained(resume):
        model = load_base(bert, ["bad", "good"], tokenizer, 0, "cpu")
        return train_classifier(model, examples, [0, 1], options, resume), model

    report, want = trained(None)

    class Cut(Resume):
        def save(self, done, sums):
            super().save(done, sums)
            if done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(Cut(tmp_path / "tuned", {"a": 1}))
    again, found = trained(Resume(tmp_path / "tuned", {"a": 1}))
    assert again == report
    for (name, one), other in zip(want.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_loss_that_is_not_finite_stops_with_the_step(bert):
    tokenizer = load_tokenizer(bert)
    model = load_base(bert, ["bad", "good"], tokenizer, 0, "cpu")
    with pytest.raises(InputError, match=r"the loss is nan at step \d of 5; lower `rate`"):
        train_classifier(
            model, encode_rows(tokenizer, table(40), 24), [0, 1], Tuning(task="t", steps=5, batch=8, rate=1e30, clip=1e30)
        )


def test_a_head_of_another_task_is_replaced_and_a_missing_layer_refused(tmp_path, tuned):
    folder, _, tokenizer, _ = tuned
    three = load_base(folder, ["a", "b", "c"], tokenizer, 0, "cpu")
    assert three.classifier.weight.shape == (3, 32)
    old = load_model(folder, "float32", "cpu")
    assert torch.equal(three.bert.embeddings.word_embeddings.weight, old.bert.embeddings.word_embeddings.weight)
    state = {k: v for k, v in old.state_dict().items() if k != "bert.encoder.layer.1.output.dense.weight"}
    old.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"bert.encoder.layer.1.output.dense.weight is missing"):
        load_base(tmp_path, ["a", "b"], tokenizer, 0, "cpu")


@pytest.mark.parametrize("family", ["roberta_masked", "gpt2", "opt", "llama"])
def test_other_families_are_tuned_too(family, tmp_path):
    tokenizer = load_tokenizer(ROOT / "resources" / "models" / "demo")
    pico(family).save_pretrained(tmp_path)
    model = load_base(tmp_path, ["x", "y"], tokenizer, 0, "cpu")
    assert takes_types(model.config) == (family == "roberta_masked"), (
        "two types are its default; GPT-2 would embed them as tokens"
    )
    assert padding_of(model.config) is not None
    examples = encode_rows(tokenizer, table(16), 24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_classifier(model, examples, [0, 1], Tuning(task="t", steps=2, batch=4, rate=1e-3, warmup=0.0))
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    alone, together = (predict_classes(model, examples, [0, 1], batch) for batch in (1, 16))
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_a_decoder_without_padding_is_refused():
    with pytest.raises(InputError, match="has no pad_token_id"):
        padding_of(transformers.GPT2Config())


def test_the_table_tells_the_difference_to_the_control():
    labels, own = random_outputs(5)
    _, dense = random_outputs(6)
    _, control = random_outputs(7)
    cells = {
        "d": ("dense", "none", dense),
        "c": ("dense", "again", control),
        "m": ("svd", "again", own),
        "n": ("svd", "none", own),
    }
    rows_of, results = [], {}
    for path, (method, recovery, outputs) in cells.items():
        calibration = "none" if path == "d" else "rows"
        names = {"model": "m", "calibration": calibration, "method": method, "recovery": recovery, "evaluation": "e"}
        rows_of.append({**names, "result": path})
        beside = None if path == "d" else dense
        results[path] = {
            "stored_bytes": 1,
            "dense_bytes": 2,
            "tasks": {"e": {"documents": 200, "labels": ["0", "1"]}},
            "scores": {"e": scores(labels, outputs, 2, beside)},
            "per_row": {"label": labels, **outputs},
        }
    found = classification_table(rows_of, results)
    assert list(found.columns) == COLUMNS
    accuracy = found[found["measure"] == "accuracy"].set_index(["method", "recovery"])
    want = scores(labels, own, 2, control)["accuracy"]
    assert accuracy.loc["svd", "again"]["delta_control"] == want["delta"]
    assert accuracy.loc["svd", "again"]["delta_control_se"] == want["delta_se"]
    assert accuracy.loc["svd", "again"]["delta"] == scores(labels, own, 2, dense)["accuracy"]["delta"]
    assert accuracy["delta_control"].notna().sum() == 1
    assert accuracy.loc["dense", "none"]["delta"] == 0.0


def configuration(**changes):
    task = {"kind": "classification", "train": ["a.csv"], "test": ["b.csv"], "columns": ["sentence"]}
    base = {
        "models": {"m": {"source": "x", "finetune": {"task": "t", "steps": 5}}},
        "texts": {"words": {"files": ["w.txt"]}},
        "calibrations": {"rows": {"task": "t", "windows": 4}},
        "methods": {"svd": {"structure": {"kind": "low_rank"}, "metric": {"kind": "weights"}}},
        "budgets": {"half": {"keep_bytes": 0.5}},
        "recoveries": {"none": {"kind": "none"}, "again": {"kind": "finetune", "task": "t", "steps": 3}},
        "evaluations": {"t": task, "some": {**task, "limit": 10}, "other": {**task, "train": ["c.csv"]}},
        "experiments": {
            "e": {
                "models": ["m"],
                "calibrations": ["rows"],
                "methods": ["svd"],
                "budgets": ["half"],
                "recoveries": ["none", "again"],
                "evaluations": ["t"],
            }
        },
    }
    for keys, value in changes.items():
        *path, last = keys.split("__")
        place = base
        for key in path:
            place = place[key]
        place[last] = value
    return base


def test_labels_follow_what_is_learned_and_not_how_it_is_scored():
    def labels(**changes):
        return Plan(load(configuration(**changes)), ROOT).labels

    before = labels()

    def moved(**changes):
        after = labels(**changes)
        return {(s, n) for s in before for n in before[s] if before[s][n] != after[s][n]}

    learners = {("models", "m"), ("calibrations", "rows"), ("recoveries", "again")}
    assert moved(evaluations__t__limit=7) == {("evaluations", "t")}
    assert moved(evaluations__t__train=["z.csv"]) == {("evaluations", "t"), *learners}
    assert moved(evaluations__t__length=64) == {("evaluations", "t"), *learners}
    assert moved(models__m__finetune={"task": "t", "steps": 6}) == {("models", "m")}
    assert moved(recoveries__again={"kind": "finetune", "task": "t", "steps": 4}) == {("recoveries", "again")}
    plan = Plan(load(configuration()), ROOT)
    assert plan.task_label("t") == plan.task_label("some") != plan.task_label("other")
    assert plan.knows("task", plan.task_label("t"))
    assert plan.task_label("t") in plan.all_labels()
    assert plan.spec("tokenize_rows", {"windows": before["calibrations"]["rows"]})["length"] == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models__m__finetune": {"task": "x"}}, "models.m.finetune.task: there is no 'x'; valid: other, some, t"),
        ({"evaluations__x": {"text": "words"}, "calibrations__rows": {"task": "x"}}, "calibrations.rows.task: there is no 'x'"),
        (
            {"experiments__e__evaluations": ["other"]},
            "models.m.finetune.task uses other train rows than evaluation 'other'",
        ),
        ({"calibrations__rows": {"task": "t", "text": "words"}}, "give either `text` or `task`"),
        ({"calibrations__rows": {"task": "t", "length": 9}}, "remove `length`"),
        ({"evaluations__t__test": ["a.csv"]}, "a.csv: in both"),
        ({"evaluations__t__test": []}, "give either `train` and `test`, or `dataset`"),
        ({"evaluations__t__train": ["a.tsv"]}, "a.tsv: the name must end in one of"),
        ({"recoveries__again": {"kind": "refine"}}, "recovery 'again' needs windows of a text"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    if "evaluations__x" in changes:
        changes = {**changes, "experiments__e__calibrations": ["rows"]}
    with pytest.raises(InputError, match=message):
        load(configuration(**changes))


def test_some_rows_of_the_same_task_may_be_scored():
    plan = Plan(load(configuration(experiments__e__evaluations=["t", "some"])), ROOT)
    assert len(plan.cells.of("classification")) == 2 * (1 + 1 + 2)
