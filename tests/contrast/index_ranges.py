"""What the index arithmetic of a kernel can reach, without running it: intervals over Triton's own representation.

`ranges` goes through the text of a kernel (TTIR) once, with the numbers of a launch and the size of its grid, and
follows each integer as an interval: a program's number, a block's offsets, class ids that are loaded. It returns the
32-bit results that may leave 32 bits, and the bytes that the launch asks for, by pointer. What is loaded has to be
declared (`LOADED`), and an operation on integers that is not known here is an error, not a guess.
"""
import re
from math import prod

BITS = {'i1': 1, 'i8': 8, 'i32': 32, 'i64': 64}
BYTES = {'i64': 8, 'f64': 8, 'i32': 4, 'f32': 4, 'bf16': 2, 'f16': 2}
LINE = re.compile(r'^(?:(%[\w#]+)(?::\d+)? = )?"?([a-z_]+\.[a-z_.]+)"?(.*)$')


def kind(text):
    "Element type and numbers of a type: `tensor<64x1x!tt.ptr<f32>>` -> ('ptr f32', 64)."
    inner = re.fullmatch(r'tensor<((?:\d+x)+)(.*)>', text.strip())
    sizes, element = (inner[1], inner[2]) if inner else ('', text.strip())
    pointer = re.fullmatch(r'!tt\.ptr<(.*)>', element)
    return f'ptr {pointer[1]}' if pointer else element, prod(int(s) for s in sizes.split('x') if s)


class Ranges:
    def __init__(self, ttir, numbers, grid, loaded):
        lines = [re.sub(r' loc\(.*', '', line).strip() for line in ttir.splitlines()]
        self.lines = [line for line in lines if line and not line.startswith(('#', 'module'))]
        self.grid, self.loaded = (*grid, 1, 1)[:3], loaded
        self.values, self.overflows, self.bytes, self.times = {}, set(), {}, prod(self.grid)
        head = next(i for i, line in enumerate(self.lines) if line.startswith('tt.func'))
        signature = next(line for line in ttir.splitlines() if 'tt.func' in line)
        for name, type_ in re.findall(r'%(\w+): (!tt\.ptr<\w+>|\w+)', signature):
            if type_.startswith('!tt.ptr'): self.values['%'+name] = name
            elif type_ in BITS: self.values['%'+name] = (numbers[name],)*2
        self.block(head + 1)

    def get(self, name): return self.values.get(name)

    def block(self, i):
        "Goes through the lines of a region; what it yields, and where it ends."
        yielded = []
        while i < len(self.lines):
            line = self.lines[i]
            if line.startswith('}'): return yielded, i
            if line.startswith(('^bb', 'cf.')) or 'tt.return' in line: i += 1; continue
            found = LINE.match(line)
            if not found: raise ValueError(f"unknown line {line!r}")
            name, op, rest = found.groups()
            if op == 'scf.for': i = self.loop(name, rest, i)
            elif op == 'scf.if': i = self.branches(name, i)
            elif op == 'tt.reduce': i = self.reduce(name, rest, i)
            elif op in ('scf.yield', 'tt.reduce.return'):
                yielded, i = re.findall(r'%[\w#]+', rest.split(' : ')[0]), i + 1
            else: self.step(name, op, rest); i += 1
        return yielded, i

    def results(self, name, values):
        for j, v in enumerate(values):
            self.values[name if len(values) == 1 else f'{name}#{j}'] = v

    def loop(self, name, rest, i):
        over = re.match(r' (?:unsigned )?(%\S+) = (%\S+) to (%\S+) step (%\S+)', rest)
        index, (begin, end, step) = over[1], (self.get(v) for v in over.groups()[1:])
        carried = re.findall(r'(%\w+) = (%[\w#]+)', rest[over.end():].split('->')[0])
        trips = max(0, -(-(end[1] - begin[0])//step[0]))
        before, start = self.times, {a: self.get(v) for a, v in carried}
        self.values[index], self.times = (begin[0], max(begin[0], end[1] - 1)), before*trips
        kept = dict(self.bytes), set(self.overflows)
        self.values |= start
        yielded, stop = self.block(i + 1)
        grown = {a: self.widened(start[a], self.get(y), trips) for (a, _), y in zip(carried, yielded)}
        if any(grown[a] != start[a] for a in grown):
            self.bytes, self.overflows = kept
            self.values |= grown
            yielded, stop = self.block(i + 1)
        if name: self.results(name, [self.joined(start[a], self.get(y)) for (a, _), y in zip(carried, yielded)])
        self.times = before
        return stop + 1

    @staticmethod
    def widened(first, after, trips):
        "A carried value over all trips, if each adds as much as the first; a value that is chosen adds nothing."
        if not isinstance(first, tuple): return first
        return first[0] + min(0, after[0] - first[0])*trips, first[1] + max(0, after[1] - first[1])*trips

    def branches(self, name, i):
        first, stop = self.block(i + 1)
        if self.lines[stop].startswith('} else'): second, stop = self.block(stop + 1)
        else: second = first
        if name: self.results(name, [self.joined(self.get(a), self.get(b)) for a, b in zip(first, second)])
        return stop + 1

    def reduce(self, name, rest, i):
        source = re.findall(r'%[\w#]+', rest)[0]
        body = self.lines[i + 2]
        stop = next(j for j in range(i, len(self.lines)) if self.lines[j].startswith('})'))
        types = self.lines[stop].split(' : ')[1].split(' -> ')
        value, (_, inner), (element, outer) = self.get(source), kind(types[0].strip('()')), kind(types[1])
        if 'arith.addi' in body:
            count = inner//outer
            value = self.fits(name, (value[0]*count, value[1]*count), element)
        self.values[name] = value
        return stop + 1

    def joined(self, a, b):
        if not isinstance(a, tuple) or not isinstance(b, tuple): return a if b is None else b
        return min(a[0], b[0]), max(a[1], b[1])

    def fits(self, name, value, element):
        limit = 2**(BITS[element] - 1)
        if element == 'i1': return 0, 1
        if value[0] < -limit or value[1] >= limit:
            self.overflows.add(f'{name}: {element} in {value}')
            return max(value[0], -limit), min(value[1], limit - 1)
        return value

    def step(self, name, op, rest):
        text, _, types = rest.rpartition(' : ')
        operands = re.findall(r'%[\w#]+', text if op != 'tt.store' else rest)
        values = [self.get(v) for v in operands]
        last = types.split(' to ')[-1].split(' -> ')[-1].split(', ')
        element, _ = kind(last[-1 if op == 'arith.select' else 0])
        if op in ('tt.load', 'tt.store', 'tt.atomic_rmw'): return self.memory(name, op, types, operands, values)
        if op in ('tt.splat', 'tt.broadcast', 'tt.expand_dims', 'arith.extsi', 'tt.reshape'):
            self.values[name] = values[0]
        elif op == 'tt.addptr': self.values[name] = values[0]
        elif op == 'arith.constant':
            number = re.search(r'(?:dense<)?(-?\d+|true|false)>?$', text.strip())
            if element in BITS:
                n = {'true': 1, 'false': 0}.get(number[1]) if number[1] in ('true', 'false') else int(number[1])
                self.values[name] = (n, n)
        elif element not in BITS or op in ('tt.dot', 'arith.sitofp'): return
        else: self.values[name] = self.fits(name, self.arithmetic(op, rest, values, element), element)

    def memory(self, name, op, types, operands, values):
        element, count = kind(types.split(', ')[0])
        if op == 'tt.atomic_rmw': element, count = kind(types.split(', ')[0].strip('('))
        pointer, size = values[0], BYTES[element.removeprefix('ptr ')]
        self.bytes[pointer] = self.bytes.get(pointer, 0) + count*size*self.times
        if op == 'tt.load' and element.removeprefix('ptr ') in BITS:
            if pointer not in self.loaded: raise ValueError(f"what {pointer} holds must be declared")
            other = values[2] if len(values) > 2 else None
            self.values[name] = self.joined(self.loaded[pointer], other) if other else self.loaded[pointer]

    def arithmetic(self, op, rest, values, element):
        if op in ('arith.cmpi', 'arith.cmpf', 'arith.andi', 'arith.ori', 'arith.xori') and element == 'i1': return 0, 1
        if op in ('arith.cmpi', 'arith.cmpf'): return 0, 1
        if op == 'tt.get_program_id': return 0, self.grid['xyz'.index(rest.split()[0])] - 1
        if op == 'tt.make_range':
            end, start = (int(re.search(rf'{w} = (\d+)', rest)[1]) for w in ('end', 'start'))
            return start, end - 1
        if op == 'arith.select': return self.joined(values[1], values[2])
        if op in ('arith.extui', 'arith.trunci'): return values[0]
        if op in ('tt.bitcast', 'arith.fptosi'): return -2**(BITS[element] - 1), 2**(BITS[element] - 1) - 1  # any
        a, b = values
        if op == 'arith.addi': return a[0] + b[0], a[1] + b[1]
        if op == 'arith.subi': return a[0] - b[1], a[1] - b[0]
        products = [x*y for x in a for y in b]
        if op == 'arith.muli': return min(products), max(products)
        if op == 'arith.minsi': return min(a[0], b[0]), min(a[1], b[1])
        if op == 'arith.maxsi': return max(a[0], b[0]), max(a[1], b[1])
        if op == 'arith.divsi': return min(a[0]//max(b[0], 1), 0), max(a[1], 0)//max(b[0], 1)
        if op == 'arith.remsi': return min(0, max(a[0], 1 - b[1])), max(0, min(a[1], b[1] - 1))
        raise ValueError(f"unknown operation {op}")


def ranges(ttir, numbers, grid, loaded):
    "The 32-bit results that may overflow, as text, and bytes by pointer name."
    found = Ranges(ttir, numbers, grid, loaded)
    return sorted(found.overflows), found.bytes
