"""Whether a tokenizer's chat template, which is a small program, comes to an end.

Jinja's sandbox keeps it from files and code, not from a loop without end or a text without limit.
So it is tried in a process of its own, with little time and memory, before it is used here.
"""

import json
import re
import subprocess
import sys

from common.errors import UserError

SECONDS, MEMORY = 20, 2**30  # that a template may take
# Renders as transformers does, so that the template cannot tell the trial from its use.
TRIAL = """
import json, sys
from datetime import datetime
given = json.load(sys.stdin)
sys.path[:] = given["path"]
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (given["memory"],) * 2)
except (ImportError, ValueError, OSError):
    # not on Windows; a Mac refuses; a lower limit may be there already
    pass

def raise_exception(message):
    raise ValueError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
)
def strftime_now(format):
    return datetime.now().strftime(format)

environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
try:
    environment.from_string(given["template"]).render(given["values"])
except Exception as error:
    reason = str(error).strip() or type(error).__name__
    sys.exit(reason.splitlines()[0][:200])
"""


def try_template(template: object, values: dict) -> None:
    """UserError where a template cannot be rendered with these values, or not within the limits."""
    if not isinstance(template, str):
        raise UserError("it has no chat template")
    # A tag of transformers' own, which marks answers.
    template = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    given = {"path": sys.path, "memory": MEMORY, "template": template, "values": values}
    try:
        finished = subprocess.run(
            [sys.executable, "-c", TRIAL],
            input=json.dumps(given),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"its chat template does not end within {SECONDS} s") from None
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise UserError(f"its chat template fails: {reason:.200}")
