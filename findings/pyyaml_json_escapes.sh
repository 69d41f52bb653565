#!/bin/sh
# The guess: YAML takes JSON as it is, so a YAML reader gives the same text as a JSON reader for what json.dumps wrote.
# What happens: JSON writes a character beyond U+FFFF as two escapes ("\ud83d\ude00"), and Python's json joins them again.
# PyYAML (6.0.3) reads each escape as a character of its own: the text has two halves of a surrogate pair instead of one
# emoji. It prints as an error, no file takes it, and it is not equal to what was written. No warning is given.
# json.dumps(..., ensure_ascii=False), or joining the halves after reading, gives the right text.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet pyyaml==6.0.3
"$folder/venv/bin/python" - <<'PYTHON'
import json
import platform
import sys

import yaml

print("Python", platform.python_version(), "PyYAML", yaml.__version__)
written = ["a boat \U0001f600"]
text = json.dumps(written)
print("written by json:", text)
by_json, by_yaml = json.loads(text), yaml.safe_load(text)
print("read by json:  ", ascii(by_json), by_json == written)
print("read by PyYAML:", ascii(by_yaml), by_yaml == written)
try:
    by_yaml[0].encode()
    encodes = True
except UnicodeEncodeError as error:
    encodes = False
    print("as UTF-8:      ", error)
plain = yaml.safe_load(json.dumps(written, ensure_ascii=False))
joined = by_yaml[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")
same = by_json == written and by_yaml == ["a boat \ud83d\ude00"] and not encodes
sys.exit(0 if same and plain == written and joined == written[0] else 1)
PYTHON
