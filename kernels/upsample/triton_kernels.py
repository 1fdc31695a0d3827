"""Triton kernels that look at upsampled logits without storing them.

Each program makes its pixels from the four low-resolution neighbours, a block of classes at a time.
Positions and weights are found in integers (see rows.py), in 64 bits where WIDE says that 32 are too few.
"""

import triton
import triton.language as tl


@triton.jit
def source_position(places, source, target, WIDE: tl.constexpr):
    """Where these output places lie in the source, an integer in steps of 1 / (2 target)."""
    if WIDE:
        places = places.to(tl.int64)
    return tl.maximum((2 * places + 1) * source - target, 0)


@triton.jit
def neighbours(position, source, target):
    """Near and far source place of a position, exact, and the far one's weight."""
    inverse = 1.0 / (2.0 * target)
    # Division of integers would take many registers. Up to a million places this is 1 off at most.
    near = (position.to(tl.float32) * inverse).to(position.dtype)
    rest = position - near * (2 * target)
    near += tl.where(rest < 0, -1, tl.where(rest < 2 * target, 0, 1))
    weight = (position - near * (2 * target)).to(tl.float32) * inverse
    near = near.to(tl.int32)
    return near, tl.minimum(near + 1, source - 1), weight


@triton.jit
def tent_weight(own, position, source, target, WIDE: tl.constexpr):
    """A source place's weight in an output position: the tent 1 - |distance|, level behind the last one."""
    place = own
    if WIDE:
        place = own.to(tl.int64)
    distance = position - place * (2 * target)
    distance = tl.where(own == source - 1, tl.minimum(distance, 0), distance)
    return tl.maximum(1.0 - tl.abs(distance).to(tl.float32) * (1.0 / (2.0 * target)), 0.0)


@triton.jit
def first_fed(place, source, target, WIDE: tl.constexpr):
    """The first output place whose near source place is this one or lies behind it; 0 up to the first."""
    if WIDE:
        place = place.to(tl.int64)
    numerator = tl.maximum((2 * place + 1) * target - source, 0)
    fed = tl.minimum((numerator + 2 * source - 1) // (2 * source), target)
    return tl.where(place > 0, fed, 0).to(tl.int32)


@triton.jit
def upsampled_tile(logits, row, columns, classes, strides, inside):
    """(pixels, classes) float32 of one output row; classes and pixels outside are -inf.

    logits points to the first of the classes, which count from 0: offsets within a tile stay small.
    row, columns: their `neighbours`. strides: of rows, columns, classes.
    """
    near_row, far_row, far_row_weight = row
    near_columns, far_columns, far_column_weights = columns
    row_stride, column_stride, class_stride = strides
    near_places = near_columns[:, None] * column_stride + classes[None, :] * class_stride
    far_places = far_columns[:, None] * column_stride + classes[None, :] * class_stride
    upper = logits + near_row.to(tl.int64) * row_stride
    lower = logits + far_row.to(tl.int64) * row_stride
    upper_near = tl.load(upper + near_places, mask=inside, other=0.0).to(tl.float32)
    upper_far = tl.load(upper + far_places, mask=inside, other=0.0).to(tl.float32)
    lower_near = tl.load(lower + near_places, mask=inside, other=0.0).to(tl.float32)
    lower_far = tl.load(lower + far_places, mask=inside, other=0.0).to(tl.float32)
    far_weight = far_column_weights[:, None]
    near_weight = 1.0 - far_weight
    above = near_weight * upper_near + far_weight * upper_far
    below = near_weight * lower_near + far_weight * lower_far
    values = (1.0 - far_row_weight) * above + far_row_weight * below
    return tl.where(inside, values, -float("inf"))


@triton.jit
def upsampled_loss(
    logits,
    labels,
    class_weights,
    weight_sum,
    lse,
    losses,
    num_classes,
    height,
    width,
    map_height,
    map_width,
    batch_stride,
    class_stride,
    row_stride,
    column_stride,
    ignore_index,
    smoothing,
    WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Log-sum-exp and loss of each output pixel: 0 where ignored, NaN where the label is no class."""
    row = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    exists = columns < width
    place = (batch * height + row) * width + columns
    label = tl.load(labels + place, mask=exists, other=ignore_index).to(tl.int64)
    row_sources = neighbours(source_position(row, map_height, height, WIDE), map_height, height)
    column_sources = neighbours(source_position(columns, map_width, width, WIDE), map_width, width)
    strides = (row_stride, column_stride, class_stride)
    logits += batch * batch_stride

    highest = tl.full([BLOCK_PIXELS], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_PIXELS], tl.float32)
    picked = tl.zeros([BLOCK_PIXELS], tl.float32)
    spread = tl.zeros([BLOCK_PIXELS], tl.float32)
    block = tl.arange(0, BLOCK_CLASSES)
    for start in tl.range(0, num_classes, BLOCK_CLASSES):
        classes = start + block
        inside = exists[:, None] & (classes < num_classes)[None, :]
        values = upsampled_tile(logits, row_sources, column_sources, block, strides, inside)
        logits += BLOCK_CLASSES * class_stride
        risen = tl.maximum(highest, tl.max(values, 1))
        risen = tl.where(exists, risen, 0.0)
        weight = weight * tl.exp(highest - risen) + tl.sum(tl.exp(values - risen[:, None]), 1)
        highest = risen
        picked += tl.sum(tl.where(classes[None, :] == label[:, None], values, 0.0), 1)
        if SMOOTHED:
            finite = tl.where(inside, values, 0.0)
            if WEIGHTED:
                weights_here = tl.load(class_weights + classes, mask=classes < num_classes, other=0.0)
                finite = finite * weights_here[None, :]
            spread += tl.sum(finite, 1)

    total = highest + tl.log(weight)
    tl.store(lse + place, total, mask=exists)
    ignored = label == ignore_index
    known = (label >= 0) & (label < num_classes)
    loss = total - picked
    if WEIGHTED:
        loss *= tl.load(class_weights + label, mask=exists & known, other=0.0)
    if SMOOTHED:
        mass = num_classes
        if WEIGHTED:
            mass = tl.load(weight_sum)
        loss = (1.0 - smoothing) * loss + smoothing / num_classes * (mass * total - spread)
    loss = tl.where(known, loss, float("nan"))
    tl.store(losses + place, tl.where(ignored, 0.0, loss), mask=exists)


@triton.jit
def upsampled_loss_gradient(
    logits,
    labels,
    class_weights,
    weight_sum,
    lse,
    factor,
    grad_logits,
    num_classes,
    height,
    width,
    map_height,
    map_width,
    batch_stride,
    class_stride,
    row_stride,
    column_stride,
    grad_batch_stride,
    grad_class_stride,
    grad_row_stride,
    grad_column_stride,
    ignore_index,
    smoothing,
    WIDE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """U^T (softmax - target): each low-resolution place gathers from the output pixels it feeds."""
    own_row = tl.program_id(1)
    class_blocks = tl.cdiv(num_classes, BLOCK_CLASSES)
    batch = (tl.program_id(2) // class_blocks).to(tl.int64)
    first_class = tl.program_id(2) % class_blocks * BLOCK_CLASSES
    block = tl.arange(0, BLOCK_CLASSES)
    classes = first_class + block
    first = tl.program_id(0) * BLOCK_COLUMNS
    own = first + tl.arange(0, BLOCK_COLUMNS)
    logits += batch * batch_stride + first_class.to(tl.int64) * class_stride
    grad_logits += batch * grad_batch_stride + first_class.to(tl.int64) * grad_class_stride
    grad_logits += own_row.to(tl.int64) * grad_row_stride
    known = classes < num_classes
    strides = (row_stride, column_stride, class_stride)
    weights_here = tl.full([BLOCK_CLASSES], 1.0, tl.float32)
    mass = num_classes
    if WEIGHTED:
        weights_here = tl.load(class_weights + classes, mask=known, other=0.0)
        mass = tl.load(weight_sum)

    total = tl.zeros([BLOCK_COLUMNS, BLOCK_CLASSES], tl.float32)
    # What is near to the place before has this one as its far one.
    top = first_fed(own_row - 1, map_height, height, WIDE)
    bottom = first_fed(own_row + 1, map_height, height, WIDE)
    left = first_fed(first - 1, map_width, width, WIDE)
    right = first_fed(tl.minimum(first + BLOCK_COLUMNS, map_width), map_width, width, WIDE)
    for row in tl.range(top, bottom):
        row_position = source_position(row, map_height, height, WIDE)
        row_sources = neighbours(row_position, map_height, height)
        own_row_weight = tent_weight(own_row, row_position, map_height, height, WIDE)
        for start in tl.range(left, right, BLOCK_PIXELS):
            columns = start + tl.arange(0, BLOCK_PIXELS)
            exists = columns < right
            place = (batch * height + row) * width + columns
            label = tl.load(labels + place, mask=exists, other=ignore_index).to(tl.int64)
            position = source_position(columns, map_width, width, WIDE)
            column_sources = neighbours(position, map_width, width)
            values = upsampled_tile(
                logits, row_sources, column_sources, block, strides, exists[:, None] & known[None, :]
            )
            row_lse = tl.load(lse + place, mask=exists, other=0.0)
            probabilities = tl.exp(values - row_lse[:, None])
            known_label = (label >= 0) & (label < num_classes)
            valid = exists & (label != ignore_index) & known_label
            weight = tl.where(valid, 1.0, 0.0)
            if WEIGHTED:
                weight = tl.load(class_weights + label, mask=valid, other=0.0)
            hit = classes[None, :] == label[:, None]
            slopes = weight[:, None] * (probabilities - tl.where(hit, 1.0, 0.0))
            if SMOOTHED:
                even = mass * probabilities - weights_here[None, :]
                slopes = (1.0 - smoothing) * slopes + smoothing / num_classes * tl.where(
                    valid[:, None], even, 0.0
                )
            feeding = tent_weight(own[:, None], position[None, :], map_width, width, WIDE) * own_row_weight
            feeding = tl.where(exists[None, :], feeding, 0.0)
            total = tl.dot(feeding, slopes, total, input_precision=PRECISION)

    places = own[:, None] * grad_column_stride + block[None, :] * grad_class_stride
    total *= tl.load(factor)
    inside = (own < map_width)[:, None] & known[None, :]
    tl.store(grad_logits + places, total.to(grad_logits.dtype.element_ty), mask=inside)


@triton.jit
def upsampled_argmax(
    logits,
    ids,
    confidence,
    num_classes,
    height,
    width,
    map_height,
    map_width,
    batch_stride,
    class_stride,
    row_stride,
    column_stride,
    WIDE: tl.constexpr,
    CONFIDENT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """The argmax class of each output pixel, the lowest id of equals, and its softmax."""
    row = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    exists = columns < width
    row_sources = neighbours(source_position(row, map_height, height, WIDE), map_height, height)
    column_sources = neighbours(source_position(columns, map_width, width, WIDE), map_width, width)
    strides = (row_stride, column_stride, class_stride)
    logits += batch * batch_stride

    highest = tl.full([BLOCK_PIXELS], -float("inf"), tl.float32)
    best_class = tl.zeros([BLOCK_PIXELS], tl.int32)
    weight = tl.zeros([BLOCK_PIXELS], tl.float32)
    block = tl.arange(0, BLOCK_CLASSES)
    for start in tl.range(0, num_classes, BLOCK_CLASSES):
        classes = start + block
        inside = exists[:, None] & (classes < num_classes)[None, :]
        values = upsampled_tile(logits, row_sources, column_sources, block, strides, inside)
        logits += BLOCK_CLASSES * class_stride
        best = tl.max(values, 1)
        index = start + tl.argmax(values, 1, tie_break_left=True)
        best_class = tl.where(best > highest, index.to(tl.int32), best_class)
        risen = tl.where(exists, tl.maximum(highest, best), 0.0)
        if CONFIDENT:
            weight = weight * tl.exp(highest - risen) + tl.sum(tl.exp(values - risen[:, None]), 1)
        highest = risen

    place = (batch * height + row) * width + columns
    tl.store(ids + place, best_class.to(ids.dtype.element_ty), mask=exists)
    if CONFIDENT:
        tl.store(confidence + place, 1.0 / weight, mask=exists)
