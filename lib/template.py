"""A stranger's chat template: Jinja in a sandbox, with a budget for all that it computes.

Jinja's own sandbox keeps a template from reaching out. It does not keep it from `{{ 10 ** 10**8 }}`, doubling
a string forty times or nesting loops. Here every step that a template can take pays before it is taken, by
what it will make: BUDGET is far above what published templates need and some seconds at most.
"""

import json
from functools import wraps
from inspect import isgenerator
from itertools import islice

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LARGEST = 1 << 17  # characters of a template; the longest of trl's has 20,000
BUDGET = 1_000_000  # steps of a rendering: a turn of a loop, an element or four characters that are made
PER_INPUT = 32  # steps more for each that its input is worth
CALL = 10  # steps that a call is worth

# What published templates use and more, without what makes long texts of short ones: format, center, …
FILTERS = set("abs capitalize count d default dictsort e escape first float indent int items join last "
              "length list lower map max min reject rejectattr replace reverse safe select selectattr "
              "sort string title tojson trim unique upper".split())
CHEAP = {"length", "count", "first", "last", "default", "d"}  # look at no element, or one
TEXT = ("capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric "
        "isspace isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper")
CONTAINERS = (list, tuple, set, type({}.keys()), type({}.values()), type({}.items()))
METHODS = {str: set(TEXT.split()), dict: {"copy", "get", "items", "keys", "values"},
           (list, tuple): {"copy", "count", "index"}, (int, float, bytes, range, type): set()}


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, some templates' mark of assistant words: rendered as is."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Charge(NodeTransformer):
    """Has a template pay for what Jinja compiles to plain Python: loops, literals, ~, comparisons, slices."""

    def visit_Block(self, node):
        raise TemplateError("blocks are not offered here")

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "turns of a loop", [], [], None, None)
        return node

    def paid(self, node):
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"  # the names of `for a, b in …`
        return node if stored else nodes.Filter(node, "value", [], [], None, None)

    visit_List = visit_Tuple = visit_Dict = paid

    def visit_Getitem(self, node):
        return self.paid(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Concat(self, node):
        node.nodes = [nodes.Filter(part, "value", [], [], None, None) for part in node.nodes]
        return self.paid(node)

    def visit_Compare(self, node):
        for part in (node, *node.ops):
            part.expr = nodes.Filter(part.expr, "value", [], [], None, None)
        return self.generic_visit(node)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers' `apply_chat_template` offers it, in which every step is paid from `left`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols],
                         finalize=self.value, optimized=False)  # what is folded would pay once, not each time
        self.left = BUDGET
        self.filters |= {"tojson": self.tojson, "replace": self.replace, "join": self.join,
                         "indent": self.indent}
        self.filters = {name: self.charged(name, function, name in FILTERS)
                        for name, function in self.filters.items()}
        self.filters |= {"turns of a loop": self.turns, "value": self.value}
        self.tests = {name: self.charged(name, function) for name, function in self.tests.items()}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}

    def _generate(self, source, *args, **kwargs):
        source = Charge().visit(source).set_environment(self)
        return super()._generate(source, *args, **kwargs)

    # ------------------------------------------------------------ paying

    def spend(self, steps: int) -> None:
        """Pay. Raises TemplateError where nothing is left."""
        self.left -= steps
        if self.left < 0:
            raise TemplateError("it asks for more time or memory than any chat template needs")

    def size(self, value) -> int:
        """What a value is worth: 1, for an element, or four characters; shared ones count each time."""
        if isinstance(value, str):
            return 1 + len(value) // 4
        if isinstance(value, int) and value.bit_length() > 64:
            raise TemplateError("a number of more than 64 bits")
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        if isinstance(value, dict):
            value = [*value, *value.values()]
        total = 1
        if isinstance(value, CONTAINERS):
            for part in value:
                total += 1 + len(part) // 4 if type(part) is str else self.size(part)
                if total > self.left:
                    self.spend(total)
        return total

    def value(self, value):
        """The value, paid for."""
        self.left -= 1 + len(value) // 4 if type(value) is str else self.size(value)
        if self.left < 0:
            self.spend(0)
        return value

    def turns(self, values) -> list:
        """The elements that a loop takes one by one, paid for."""
        if hasattr(values, "__len__"):
            self.spend(len(values))
            return list(values)
        values = list(islice(values, self.left + 1))
        self.spend(len(values))
        return values

    def concat(self, pieces) -> str:
        """The pieces of a text in one, each paid for as it comes."""
        return "".join([self.value(piece) for piece in pieces])

    def charged(self, name: str, function, offered: bool = True):
        """A filter or test that pays for what it takes and for what it gives."""
        @wraps(function)  # with its mark of what Jinja passes to it
        def paying(*args, **kwargs):
            if not offered:
                raise TemplateError(f"the filter {name} is not offered here")
            self.spend(1)
            for value in () if name in CHEAP else (*args, *kwargs.values()):
                self.value(value)
            found = function(*args, **kwargs)
            return self.value(self.turns(found) if isgenerator(found) else found)

        return paying

    # ------------------------------------------------------------ what Jinja asks the environment for

    def call_binop(self, context, operator, left, right):
        if operator == "**" or operator == "%" and isinstance(left, str):
            raise TemplateError(f"the operator {operator} is not offered here")
        for sequence, times in ((left, right), (right, left)) if operator == "*" else ():
            if hasattr(sequence, "__len__") and isinstance(times, int):
                self.spend(max(times, 0) * len(sequence))
        return self.value(self.binop_table[operator](left, right))

    def is_safe_attribute(self, obj, attr, value):
        offered = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return attr in offered if offered is not None else super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value):
        return None  # format and format_map are not offered

    def call(self, context, function, *args, **kwargs):
        self.spend(CALL + self.size(args) + self.size(kwargs))
        text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(text, str) and name in METHODS[str]:
            self.spend(len(text) if "split" in name else 0)  # an element for each character, at most
            self.spend(text.count(args[0]) * len(args[1]) if name == "replace" else 0)
            self.spend(len(text) * len(args[0]) if name == "join" else 0)
        if name == "strftime":
            self.spend(64 * len(args[0]))  # %99d: C's library gives up at 256 characters for each of a format
        return self.value(super().call(context, function, *args, **kwargs))

    # ------------------------------------------------------------ filters

    def tojson(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """As transformers has it: without escapes for HTML."""
        if len(str(indent)) > 4 or isinstance(indent, int) and indent > 8 or len(str(separators)) > 40:
            raise TemplateError("tojson with an indent or separators out of the ordinary")
        return self.concat(json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                                            sort_keys=sort_keys).iterencode(value))

    def replace(self, text, old, new, count=-1):
        text, old, new = str(text), str(old), str(new)
        self.spend(text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def join(self, values, d="", attribute=None):
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in self.turns(values)]
        values = [str(value) for value in self.turns(values)]
        self.spend(len(str(d)) * len(values))
        return str(d).join(values)

    def indent(self, text, width=4, first=False, blank=False):
        self.spend((len(width) if isinstance(width, str) else abs(width)) * (1 + str(text).count("\n")))
        return do_indent(text, width, first, blank)


def _raise_exception(message):
    raise TemplateError(str(message))


class Template:
    """A compiled template. Raises jinja2.TemplateError where it is none, is too long, or costs too much.

    names: what it finds beside its variables: special tokens, strftime_now.
    """

    def __init__(self, source: str, names: dict):
        if len(source) > LARGEST:
            raise TemplateError(f"expected at most {LARGEST} characters, found {len(source)}")
        self.environment = Environment()
        self.environment.globals |= {"raise_exception": _raise_exception, **names}
        self.template = self.within(BUDGET, lambda: self.environment.from_string(source))

    def within(self, steps: int, work):
        """What work() gives with so many steps to spend; whatever it raises as a TemplateError."""
        self.environment.left = steps
        try:
            return work()
        except TemplateError:
            raise
        except Exception as error:  # a template can cause any: ZeroDivisionError, RecursionError, …
            raise TemplateError(f"{type(error).__name__}: {str(error)[:200]}") from None

    def render(self, **variables) -> str:
        """The text that the template makes of its variables."""
        self.environment.left = 1 << 62
        size = self.environment.size(variables)
        text = self.within(BUDGET + PER_INPUT * size, lambda: self.template.render(**variables))
        if len(text) > LARGEST + PER_INPUT * size:
            raise TemplateError(f"it writes {len(text)} characters, more than any chat template does")
        return text
