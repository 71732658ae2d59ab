"""Parameter shapes of two models that everyone knows, computed from their architectures."""

from __future__ import annotations

Shape = tuple[int, ...]

BLOCKS_OF_RESNET50 = (3, 4, 6, 3)


def equal(tensors: int, numel: int) -> list[Shape]:
    """So many vectors of one size."""
    return [(numel,)] * tensors


def resnet50(width: int = 64, classes: int = 1000) -> list[Shape]:
    """He et al. 2015, table 1, in the order in which a model has them.

    Args:
        width: Channels behind the first convolution; all others are multiples of it.
        classes: Outputs.
    """
    shapes = _convolution(width, 3, 7)
    channels = width
    for stage, blocks in enumerate(BLOCKS_OF_RESNET50):
        inner = width << stage
        for block in range(blocks):
            shapes += _convolution(inner, channels, 1)
            shapes += _convolution(inner, inner, 3)
            shapes += _convolution(4 * inner, inner, 1)
            if block == 0:  # the shortcut has to change the number of channels
                shapes += _convolution(4 * inner, channels, 1)
            channels = 4 * inner
    return [*shapes, (classes, channels), (classes,)]


def _convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
    """Without bias, followed by a batch normalization."""
    return [(outputs, inputs, size, size), (outputs,), (outputs,)]


def gpt2(
    width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024
) -> list[Shape]:
    """Radford et al. 2019, the smallest; the output shares the weights of the embedding."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    block = [*norm, *attention, *norm, *feed_forward]
    return [(vocabulary, width), (context, width), *block * layers, *norm]
