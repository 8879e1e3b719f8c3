"""Makes facts/prompts.jsonl and facts/eval.jsonl from facts/facts.tsv: plain facts about the real
world, for label-free RL with real pretrained models.

facts.tsv has four columns: kind, subject, the right answer, other spellings of it.  The prompts
carry no answers.  The held-out rows ask, in phrasings that training never uses, about subjects that
it never names (kind capital_new, symbol_new, city_new) and about some that it does (..._seen).

    python facts/make.py                     # a second; the same table gives the same bytes
    python facts/make.py --output FOLDER
"""

import argparse
import csv
import json
import os
from collections import Counter

FOLDER = os.path.dirname(os.path.abspath(__file__))
SHORT = " Answer in one short sentence."
TRAINED = {
    "capital": ["What is the capital of {}?", "Which city is the capital of {}?",
                "Tell me the capital of {}.", "Name the capital city of {}."],
    "symbol": ["What is the chemical symbol of {}?", "Which symbol stands for {} in chemistry?",
               "Tell me the chemical symbol for {}.", "Name the symbol of the element {}."],
    "city": ["In which country is {}?", "Which country is the city of {} in?",
             "Tell me which country {} is in.", "Name the country that {} belongs to."]}
HELD_OUT = {
    "capital": ["Can you tell me what the capital of {} is?",
                "A friend is flying to the capital of {}. Which city is that?"],
    "symbol": ["Can you tell me how chemists abbreviate {}?",
               "In the periodic table, what are the letters for {}?"],
    "city": ["Can you tell me the country where {} lies?",
             "A friend is flying to {}. Which country is that in?"]}


def read_table(path: str = os.path.join(FOLDER, "facts.tsv")) -> list:
    """Rows {"kind", "subject", "right", "also"}, all strings."""
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f, delimiter="\t"))


def country(name: str) -> str:
    return name.removeprefix("the ")


def parts(table: list) -> dict:
    """{country or element: part}.  "new": a third, never trained on; "seen": trained on, and asked
    about as well; "train".  Several spellings could not be judged: trained on."""
    result = {country(row["subject"]): "train" for row in table if row["kind"] != "city"}
    for kind in ("capital", "symbol"):
        for k, row in enumerate(r for r in table if r["kind"] == kind and not r["also"]):
            part = ("new", "seen", "train", "new", "train", "train")[k % 6]
            result[country(row["subject"])] = part
    return result


def part_of(row: dict, part: dict) -> str:
    """A city goes where its country goes."""
    return part[row["right"] if row["kind"] == "city" else country(row["subject"])]


def wrong_values(row: dict, table: list) -> list:
    """All other answers of the kind; of a capital also the other cities of its country."""
    kind, name = row["kind"], country(row["subject"])
    if kind == "city":
        wrong = [country(r["subject"]) for r in table if r["kind"] == "capital"]
    else:
        wrong = [r["right"] for r in table if r["kind"] == kind]
        wrong += [r["subject"] for r in table if r["kind"] == "city" and r["right"] == name]
    return [value for value in wrong if value != row["right"]]


def training_rows(table: list) -> list:
    part = parts(table)
    return [{"prompt": phrasing.format(row["subject"]) + SHORT} for row in table
            if part_of(row, part) != "new" for phrasing in TRAINED[row["kind"]]]


def held_out_rows(table: list) -> list:
    """A row for each subject that is new or seen, of a country's cities the first; the phrasings
    take turns."""
    part, asked, turns, rows = parts(table), set(), Counter(), []
    for row in table:
        name, right = f"{row['kind']}_{part_of(row, part)}", row["right"]
        if name.endswith("_train") or row["also"] or (name, right) in asked:
            continue
        asked.add((name, right))
        phrasing = HELD_OUT[row["kind"]][turns[name] % 2]
        turns[name] += 1
        fact = {"right": right, "wrong": wrong_values(row, table), "kind": name}
        rows.append({"prompt": phrasing.format(row["subject"]) + SHORT, "facts": [fact]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=FOLDER, help="the folder to write to")
    output, table = parser.parse_args().output, read_table()
    os.makedirs(output, exist_ok=True)
    for name, rows in (("prompts", training_rows(table)), ("eval", held_out_rows(table))):
        with open(os.path.join(output, f"{name}.jsonl"), "w", encoding="utf-8", newline="\n") as f:
            f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        counts = Counter(fact["kind"] for row in rows for fact in row.get("facts", ()))
        print(f"{name}.jsonl: {len(rows)} rows", *(f"{k} {n}" for k, n in counts.items()), sep=", ")


if __name__ == "__main__":
    main()
