"""The public functions and classes of the package as their source says them: read, never imported.

A parameter's description is the comment at its end of the line (nbdev's docments; of several parameters on a line it
is the last one's). Where a method says again what the base class has said, or a loss takes an option that every loss
takes (`RowOptions`), the description is found there.
"""
import ast, io, re, tokenize
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

from common import ROOT
from rules import exported, modules

SHARED = "softnce.rows", "CallOptions"  # options that stand in every loss and are described once


@dataclass(frozen=True)
class Parameter:
    name: str             # with its stars
    type: str             # as the source says it; '' where it says none
    default: str | None   # as the source says it; None: it must be given
    text: str             # what it is: shape, range, meaning
    shared: bool = False  # whether the text is that of an option that every loss takes


@dataclass(frozen=True)
class Function:
    name: str
    doc: str
    parameters: tuple[Parameter, ...]
    result: Parameter     # its name is ''
    kind: str = ""        # of a method: '' | 'property' | 'classmethod' | 'staticmethod'
    raises: frozenset = frozenset()  # the errors that its own body raises
    keyword_from: int | None = None  # the first parameter that goes by name only


@dataclass(frozen=True)
class Class:
    name: str
    doc: str
    bases: tuple[str, ...]
    constructor: Function | None  # None: it takes nothing
    methods: tuple[Function, ...] = field(default=())
    form: str = ""                # the function that a loss's module calls


def comments(source):
    "The comments of a source by line, with whether the line holds nothing else."
    found = {}
    for o in tokenize.generate_tokens(io.StringIO(source).readline):
        if o.type == tokenize.COMMENT: found[o.start[0]] = o.string.lstrip("# ").strip(), o.line.lstrip()[0] == "#"
    return found


POINTER = re.compile(r"as (?:above|(?:for |in |of )?`(\w+)`)(; .+)?")  # a comment that points to another definition
NAMED = r"\*{0,2}\w+(?:, \*{0,2}\w+)*: "  # `rows, seed: ...`, at the start of a comment or after a semicolon


def shares(note, names):
    "What a comment says of the things that end on its line: of those it names, else of the last; a pointer, of all."
    if POINTER.fullmatch(note): return dict.fromkeys(names, note)
    found = {}
    for part in re.split(rf"; (?={NAMED})", note):
        head = re.match(NAMED, part)
        said = [n for n in names for o in head[0][:-2].split(", ") if n.lstrip("*") == o.lstrip("*")] if head else []
        if said and len(said) == head[0].count(",")+1: found.update(dict.fromkeys(said, part[head.end():]))
        else: found[names[-1]] = f"{found[names[-1]]}; {part}" if names[-1] in found else part
    return found


def described(ends, notes):
    "The comments of the things that end on these lines, by name."
    lines = {line: [n for n, at in ends if at == line] for _, line in ends}
    found = {}
    for line, names in lines.items():
        if line in notes and not notes[line][1]: said, more = shares(notes[line][0], names), line+1
        elif notes.get(line-1, ("", False))[1] and line-1 not in lines: said, more = shares(notes[line-1][0], names), 0
        else: continue
        while notes.get(more, ("", False))[1] and more not in lines:  # it goes on, on lines of its own
            said[names[-1]], more = f"{said.get(names[-1], '')} {notes[more][0]}", more+1
        found.update(said)
    return found


def text(node): return "" if node is None else ast.unparse(node)


def name_of(node):
    "The last part of a decorator's or a base's name, without its call or index."
    while isinstance(node, (ast.Call, ast.Subscript)): node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def pairs(a):
    "The parameters with their stars and defaults, in order."
    plain = [*a.posonlyargs, *a.args]
    yield from (("", o, d) for o, d in zip(plain, [*[None]*(len(plain)-len(a.defaults)), *a.defaults]))
    if a.vararg: yield "*", a.vararg, None
    yield from (("", o, d) for o, d in zip(a.kwonlyargs, a.kw_defaults))
    if a.kwarg: yield "**", a.kwarg, None


def raised(node):
    "The errors that a body raises itself, by name."
    calls = (o.exc for o in ast.walk(node) if isinstance(o, ast.Raise) and o.exc)
    return frozenset(n for n in map(name_of, calls) if n[:1].isupper())


def function(node, notes, method=False):
    "A `Function` from its definition."
    kind = next((k for k in map(name_of, node.decorator_list)
                 if k in ("property", "cached_property", "classmethod", "staticmethod")), "")
    found = list(pairs(node.args))[1 if method and kind != "staticmethod" else 0:]
    ends = [(stars+o.arg, (d or o).end_lineno) for stars, o, d in found]
    says = described([*ends, *([("return", node.returns.end_lineno)] if node.returns else [])], notes)
    params = tuple(Parameter(s+o.arg, text(o.annotation), None if d is None else text(d), says.get(s+o.arg, ""))
                   for s, o, d in found)
    by_name = len([*node.args.posonlyargs, *node.args.args]) - (len(list(pairs(node.args)))-len(found))
    return Function(node.name, ast.get_docstring(node) or "", params, Parameter("", text(node.returns), None,
                    says.get("return", "")), kind.removeprefix("cached_"), raised(node),
                    by_name if node.args.kwonlyargs and not node.args.vararg else None)


def fields(node, notes):
    "The constructor that a dataclass or a NamedTuple makes of its fields, a TypedDict of its keys."
    rows = [o for o in node.body if isinstance(o, ast.AnnAssign) and not text(o.annotation).startswith("ClassVar")]
    rows = [o for o in rows if not (isinstance(o.value, ast.Call) and name_of(o.value) == "field"
                                    and any(k.arg == "init" and not k.value.value for k in o.value.keywords))]
    says = described([(o.target.id, o.end_lineno) for o in rows], notes)
    return tuple(Parameter(o.target.id, text(o.annotation), text(o.value) if o.value else None,
                           says.get(o.target.id, "")) for o in rows)


MADE = {"NamedTuple", "TypedDict"}  # bases whose fields make the constructor
OWN = {"__init__", "__call__"}      # methods with underscores that a user calls


def class_(node, notes):
    "A `Class` from its definition, without what it inherits."
    bases = tuple(map(name_of, node.bases))
    made = MADE & set(bases) or node.keywords or any(name_of(d) == "dataclass" for d in node.decorator_list)
    methods = [function(o, notes, method=True) for o in node.body if isinstance(o, ast.FunctionDef)
               and (o.name in OWN or not o.name.startswith("_"))]
    constructor = next((o for o in methods if o.name == "__init__"), None)
    if constructor is None and made:
        constructor = Function("__init__", "", fields(node, notes), Parameter("", "", None, ""))
    rest = tuple(o for o in methods if o.name != "__init__")
    form = next((name_of(o.value.args[0]) for o in node.body if isinstance(o, ast.Assign)
                 and text(o.value).startswith("staticmethod(") and o.targets[0].id == "loss"), "")
    return Class(node.name, ast.get_docstring(node) or "", bases, constructor, rest, form)


@cache
def parsed(path): return ast.parse(path.read_text(encoding="utf-8"))


@cache
def public_names(path): return list(exported(path))


@cache
def definitions(path):
    "All functions and classes at the top of a module, by name."
    notes, found = comments(path.read_text(encoding="utf-8")), {}
    for o in parsed(path).body:
        if isinstance(o, ast.FunctionDef): found[o.name] = function(o, notes)
        if isinstance(o, ast.ClassDef): found[o.name] = class_(o, notes)
    return found


def dotted(name): return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


class Package:
    "Modules by their dotted name; a name is found in its module, or in the one that its module imports it from."
    def __init__(self, root=ROOT): self.paths = {dotted(n): p for n, p in modules(root).items()}
    def __hash__(self): return id(self)
    def find(self, module, name):
        "A definition with the module that has it; (None, None) where the package has none."
        found = definitions(self.paths[module])
        if name in found: return module, found[name]
        for o in parsed(self.paths[module]).body:
            if isinstance(o, ast.ImportFrom) and any((a.asname or a.name) == name for a in o.names):
                source = self.origin(module, o)
                if source in self.paths: return self.find(source, name)
        return None, None
    def origin(self, module, node):
        "The module that a `from` names."
        if not node.level: return node.module
        here = module.split(".") + ([""] if self.paths[module].name == "__init__.py" else [])
        return ".".join([*here[:len(here)-node.level], *([node.module] if node.module else [])])
    def family(self, module, cls):
        "A class and the package's classes that it comes from, the nearest first."
        yield cls
        for base in cls.bases:
            where, found = self.find(module, base)
            if isinstance(found, Class): yield from self.family(where, found)
    @cached_property
    def shared(self):
        "The options that every loss takes, by name."
        if SHARED[0] not in self.paths: return {}
        found = definitions(self.paths[SHARED[0]])[SHARED[1]]
        return {p.name: p.text for o in self.family(SHARED[0], found) for p in o.constructor.parameters}
    def pointed(self, module, methods, fn, name):
        "The definitions that a comment points to: methods of the class, a function, the same method of a class."
        other = self.find(module, name)[1]
        if isinstance(other, Class): other = next((m for m in other.methods if m.name == fn.name), other.constructor)
        return [*(m for m in methods if m.name == name), *([other] if other else [])]
    def said(self, module, fn, same, methods, text, of):
        "A description: the text, or where it points or is silent what stands there; `of` takes it from a definition."
        to = POINTER.fullmatch(text)
        if text and not to: return text
        there = [*(self.pointed(module, methods, fn, to[1]) if to and to[1] else []), *same]
        words = next((o for o in map(of, there) if o and not POINTER.fullmatch(o)), "")
        return words + (to[2] or "" if to and words else "")
    def complete(self, module, fn, same, methods=()):
        "A function whose parameters have the descriptions that `same`, earlier definitions of it, give them."
        shared = self.shared
        def named(name): return lambda f: next((o.text for o in f.parameters if o.name == name), "")
        def parameter(p):
            words = self.said(module, fn, same, methods, p.text, named(p.name))
            own = p.name not in shared or words not in ("", shared[p.name])
            return replace(p, text=words) if own else replace(p, text=shared[p.name], shared=True)
        result = self.said(module, fn, same, methods, fn.result.text, lambda f: f.result.text)
        return replace(fn, parameters=tuple(map(parameter, fn.parameters)), result=replace(fn.result, text=result),
                       doc=fn.doc or next((f.doc for f in same if f.doc and f.name == fn.name), ""))
    def whole(self, module, name):
        "A public function, or a class with the constructor and methods that it has, inherited ones too."
        where, found = self.find(module, name)
        if isinstance(found, Function):  # the plain formula of a sum takes what the sum takes
            fast = self.find(where, name.removesuffix("_reference"))[1] if name.endswith("_reference") else None
            return self.complete(where, found, [fast] if fast else [])
        if not isinstance(found, Class): return None
        family = list(self.family(where, found))
        form = next((self.find(where, o.form)[1] for o in family if o.form), None)  # the module has its parameters
        makers = [o.constructor for o in family if o.constructor]
        every = [m for o in family for m in o.methods]
        versions = [[m for m in every if m.name == n] for n in dict.fromkeys(m.name for m in every)]
        more = [form] if form else []
        made = self.complete(where, makers[0], makers[1:]+more, every) if makers else None
        methods = [self.complete(where, v[0], v[1:]+more*(v[0].name == "forward"), every) for v in versions]
        return replace(found, constructor=made, methods=tuple(methods))
    def public(self):
        "Every public name with the module that defines it, and its definition."
        for module, path in self.paths.items():
            for name in public_names(path):
                if name in definitions(path): yield module, name, self.whole(module, name)
