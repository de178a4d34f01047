"""Launch compiled kernels by a driver that notes what it is given, on a machine with or without a GPU.

Print a word for each thing that has been found right.
"""
import torch
import triton
import triton.language as tl
from support.launch_cost import OPERATORS, IdleDriver, idle_driver

from timm_dyacts.ops.triton_tiles import Launch, launch

launched = []
asked = []


class Driver(IdleDriver):
    @staticmethod
    def launcher_cls(source, metadata):
        def note(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            launched.append((metadata.hash, (x, y, z), args))

        return note


@triton.jit
def _scale_kernel(x_ptr, y_ptr, size, factors, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, i < size) * factors[0], i < size)


def count_questions(kernel):
    ask = type(kernel).run

    def run(self, *args, **kwargs):
        asked.append(self)
        return ask(self, *args, **kwargs)

    type(kernel).run = run


count_questions(_scale_kernel)
triton.runtime.driver.set_active(Driver(90))
x, y = torch.randn(32), torch.empty(32)
planned = Launch(_scale_kernel, 4, size=32, factors=(2.0, 1.0), BLOCK=8, num_warps=1)
launch(planned, x, y)
(code, grid, args), = launched
assert grid == (4, 1, 1) and args[0] is x and args[1] is y and args[2:] == (32, (2.0, 1.0), 8), launched
print('compiled')

other = torch.randn(32)
launch(planned, other, y)
assert len(asked) == 1 and launched[1] == (code, grid, (other, y, *args[2:])), launched
print('known')

odd = torch.randn(33)[1:]
for _ in range(2):
    launch(planned, odd, y)
    again, grid, (pointer, *_) = launched[-1]
    assert again != code and pointer is odd and grid == (4, 1, 1), launched
assert len(asked) == 3
launch(planned, x, y)
assert len(asked) == 3 and launched[-1][0] == code
print('misaligned')

launch(Launch(_scale_kernel, 2, size=31, factors=(2.0, 1.0), BLOCK=8, num_warps=1), x, y)
assert len(asked) == 4 and launched[-1][0] != code and launched[-1][1] == (2, 1, 1)
print('other plan')

with idle_driver():
    triton.runtime.driver.set_active(Driver(90))
    for make, _ in OPERATORS.values():
        module, x = make(), torch.randn(2, 16, 8, 8, requires_grad=True)
        inputs = [x, *module.parameters()]
        steps = []
        for _ in range(3):
            del launched[:], asked[:]
            torch.autograd.grad(module(x).sum(), inputs, allow_unused=True)
            steps.append([(code, grid, [arg for arg in args if not isinstance(arg, torch.Tensor)])
                          for code, grid, args in launched])
        assert steps[0] and steps[0] == steps[1] == steps[2] and not asked, module
print('all')
