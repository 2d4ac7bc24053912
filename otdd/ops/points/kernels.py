"""Triton kernels of `sinkhorn_points`: tiles of the cost, and what is summed over them.

A tile is some rows by some columns of one problem. Its costs are made from products of the points,
from their differences, or read where they are stored. Exponents are in base 2: ``scale`` is
``log2(e) / eps``. A sum over many columns may be cut over programs; the parts are put together in
their order, so that results do not change from run to run. No number is added atomically.
"""

import triton
import triton.language as tl


@triton.jit
def _distances(
    x,  # (N, D) for products, (D, N) for differences; the costs, (N, M) stored or (M, N) across
    y,
    norms_x,
    norms_y,
    rows,
    columns,
    N,
    M,
    D,
    COST: tl.constexpr,
    METRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Costs between the points of a tile; outside of the problem they are finite."""
    row_ok, column_ok = rows < N, columns < M
    c = tl.zeros((BLOCK_N, BLOCK_M), x.dtype.element_ty)
    if COST == "stored":
        at = rows.to(tl.int64)[:, None] * M + columns[None, :]
        c = tl.load(x + at, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    elif COST == "across":
        at = columns.to(tl.int64)[None, :] * N + rows[:, None]
        c = tl.load(x + at, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
    elif COST == "product":
        features = tl.arange(0, BLOCK_D)
        x_at = x + rows.to(tl.int64)[:, None] * D + features[None, :]
        y_at = y + columns.to(tl.int64)[None, :] * D + features[:, None]
        for d in range(0, D, BLOCK_D):
            p = tl.load(x_at + d, mask=row_ok[:, None], other=0.0)
            q = tl.load(y_at + d, mask=column_ok[None, :], other=0.0)
            if PRECISION == "bf16":
                c = tl.dot(p.to(tl.bfloat16), q.to(tl.bfloat16), c)
            elif PRECISION == "bf16 interpreted":  # where products of bfloat16 are wrong
                c = tl.dot(p.to(tl.bfloat16).to(tl.float32), q.to(tl.bfloat16).to(tl.float32), c)
            else:
                c = tl.dot(p, q, c, input_precision=PRECISION, out_dtype=x.dtype.element_ty)
        own_x = tl.load(norms_x + rows, mask=row_ok, other=0.0)
        own_y = tl.load(norms_y + columns, mask=column_ok, other=0.0)
        c = own_x[:, None] + own_y[None, :] - 2 * c
        c = tl.where(c < 0, 0.0, c)  # not a maximum: that would make 0 of NaN
    else:
        for d in range(D):
            p = tl.load(x + d * tl.cast(N, tl.int64) + rows, mask=row_ok, other=0.0)
            q = tl.load(y + d * tl.cast(M, tl.int64) + columns, mask=column_ok, other=0.0)
            t = p[:, None] - q[None, :]
            if METRIC == "l1":
                c += tl.abs(t)
            else:
                c += t * t
    if METRIC == "l2" and (COST == "product" or COST == "differences"):
        c = tl.sqrt(c)
    return c


@triton.jit
def _between_labels(labels_x, labels_y, label_cost, rows, columns, N, M, K, L):
    """Costs between the labels of a tile; NaN for a label that is none."""
    k = tl.load(labels_x + rows, mask=rows < N, other=0)
    l = tl.load(labels_y + columns, mask=columns < M, other=0)
    known = ((k >= 0) & (k < K))[:, None] & ((l >= 0) & (l < L))[None, :]
    return tl.load(label_cost + k[:, None] * L + l[None, :], mask=known, other=float("nan"))


@triton.jit(do_not_specialize=["B", "K", "L"])
def softmin_kernel(
    out,  # (B, N), or RAW (SPLITS, B, N): base-2 logarithms of the sums
    potential,  # of the columns, (B, M)
    log2_weight,  # of the columns, (B, M)
    scale,  # (B,)
    damping,  # (B,)
    active,  # (B,): problems that go on
    x,
    y,
    norms_x,
    norms_y,
    labels_x,
    labels_y,
    label_cost,
    K,
    L,
    B,
    N,
    M,
    D,
    stride_problem_x,
    stride_problem_y,
    SPLITS: tl.constexpr,
    RAW: tl.constexpr,
    STOPS: tl.constexpr,
    COST: tl.constexpr,
    METRIC: tl.constexpr,
    LABELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``-damping eps LSE_j(log b_j + (g_j - C_ij) / eps)`` for a block of rows."""
    blocks = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    share = tl.cdiv(tl.cdiv(M, BLOCK_M), SPLITS) * BLOCK_M
    first = split * share
    last = tl.minimum(first + share, M)
    row_ok = rows < N
    if STOPS:
        going = tl.load(active + b) != 0
        last = tl.where(going, last, first)
        row_ok = row_ok & going
    s = tl.load(scale + b)
    top = tl.full((BLOCK_N,), float("-inf"), x.dtype.element_ty)
    total = tl.zeros((BLOCK_N,), x.dtype.element_ty)
    for j in range(first, last, BLOCK_M):
        columns = j + tl.arange(0, BLOCK_M)
        column_ok = columns < last
        h = tl.load(potential + b * M + columns, mask=column_ok, other=0.0)
        w = tl.load(log2_weight + b * M + columns, mask=column_ok, other=float("-inf"))
        c = _distances(
            x + b * stride_problem_x,
            y + b * stride_problem_y,
            norms_x + b * N,
            norms_y + b * M,
            rows,
            columns,
            N,
            M,
            D,
            COST,
            METRIC,
            PRECISION,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
        )
        if LABELS:
            of_x, of_y, W = labels_x + b * N, labels_y + b * M, label_cost + b * K * L
            c += _between_labels(of_x, of_y, W, rows, columns, N, M, K, L)
        t = (h[None, :] - c) * s + w[None, :]
        higher = tl.maximum(top, tl.max(t, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(t - base[:, None]), 1)
        top = higher
    log2_sum = top + tl.log2(total)
    at = out + (split.to(tl.int64) * B + b) * N + rows
    if RAW:
        tl.store(at, log2_sum, mask=row_ok)
    else:
        tl.store(at, -tl.load(damping + b) / s * log2_sum, mask=row_ok)


@triton.jit(do_not_specialize=["B", "count"])
def merge_kernel(
    out,  # (B, N)
    parts,  # (count, B, N): log2 of sums
    scale,
    damping,
    active,
    count,
    B,
    N,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``-damping eps`` times the logarithm of what all parts sum to."""
    blocks = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    row_ok = rows < N
    if STOPS:
        row_ok = row_ok & (tl.load(active + b) != 0)
    top = tl.full((BLOCK,), float("-inf"), out.dtype.element_ty)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for k in range(count):
        t = tl.load(
            parts + (tl.cast(k, tl.int64) * B + b) * N + rows, mask=row_ok, other=float("-inf")
        )
        higher = tl.maximum(top, t)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.exp2(t - base)
        top = higher
    factor = -tl.load(damping + b) / tl.load(scale + b)
    tl.store(out + b * N + rows, factor * (top + tl.log2(total)), mask=row_ok)


@triton.jit
def decide_kernel(
    f,  # (B, N): potentials, taken over from `f_next` by the problems that go on
    f_next,  # (B, N): undamped
    a,  # (B, N)
    scale,
    damping,
    rate,  # (B,): log2(e) / rho_a
    tol,  # (B,)
    active,
    n_iter,
    N,
    STARTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stops a problem whose plan, as it stands, meets its tolerance; else begins an iteration.

    The rows of the plan sum to ``a exp((f - f_next) / eps)``.
    """
    b = tl.program_id(0).to(tl.int64)
    s, damp, pull = tl.load(scale + b), tl.load(damping + b), tl.load(rate + b)
    going = tl.load(active + b) != 0
    if STARTED:
        error = tl.zeros((BLOCK,), f.dtype.element_ty)
        for i in range(0, N, BLOCK):
            rows = i + tl.arange(0, BLOCK)
            ok = rows < N
            weight = tl.load(a + b * N + rows, mask=ok, other=0.0)
            old = tl.load(f + b * N + rows, mask=ok, other=0.0)
            new = tl.load(f_next + b * N + rows, mask=ok, other=0.0)
            off = tl.abs(tl.exp2((old - new) * s) - tl.exp2(-old * pull))
            error += tl.where(weight > 0, weight * off, 0.0)
        goal = tl.load(tol + b)
        going = going & ~(tl.sum(error) <= goal)  # NaN goes on
    tl.store(active + b, going.to(tl.int32))
    tl.store(n_iter + b, tl.load(n_iter + b) + going.to(tl.int64))
    for i in range(0, N, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        new = tl.load(f_next + b * N + rows, mask=rows < N, other=0.0)
        tl.store(f + b * N + rows, damp * new, mask=(rows < N) & going)


@triton.jit(do_not_specialize=["K", "L"])
def tile_kernel(
    out,  # (B, N, M): costs, or with PLAN what `product_reference` weighs with
    f,  # (B, N)
    g,  # (B, M)
    log2_a,
    log2_b,
    u,
    v,
    kappa,  # (B,)
    scale,
    x,
    y,
    norms_x,
    norms_y,
    labels_x,
    labels_y,
    label_cost,
    K,
    L,
    N,
    M,
    D,
    stride_problem_x,
    stride_problem_y,
    PLAN: tl.constexpr,
    OVER_DISTANCE: tl.constexpr,
    COST: tl.constexpr,
    METRIC: tl.constexpr,
    LABELS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile: ``C_ij``, or ``P_ij (u_i + v_j + kappa C_ij)``."""
    down, across = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    rows = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tile % across * BLOCK_M + tl.arange(0, BLOCK_M)
    distance = _distances(
        x + b * stride_problem_x,
        y + b * stride_problem_y,
        norms_x + b * N,
        norms_y + b * M,
        rows,
        columns,
        N,
        M,
        D,
        COST,
        METRIC,
        PRECISION,
        BLOCK_N,
        BLOCK_M,
        BLOCK_D,
    )
    c = distance
    if LABELS:
        of_x, of_y, W = labels_x + b * N, labels_y + b * M, label_cost + b * K * L
        c += _between_labels(of_x, of_y, W, rows, columns, N, M, K, L)
    if PLAN:
        row_ok, column_ok = rows < N, columns < M
        s = tl.load(scale + b)
        own = tl.load(f + b * N + rows, mask=row_ok, other=0.0)
        theirs = tl.load(g + b * M + columns, mask=column_ok, other=0.0)
        wa = tl.load(log2_a + b * N + rows, mask=row_ok, other=float("-inf"))
        wb = tl.load(log2_b + b * M + columns, mask=column_ok, other=float("-inf"))
        t = (own[:, None] + theirs[None, :] - c) * s
        used = (wa > float("-inf"))[:, None] & (wb > float("-inf"))[None, :]
        plan = tl.where(used, tl.exp2(t + wa[:, None] + wb[None, :]), 0.0)
        by_row = tl.load(u + b * N + rows, mask=row_ok, other=0.0)
        by_column = tl.load(v + b * M + columns, mask=column_ok, other=0.0)
        c = plan * (by_row[:, None] + by_column[None, :] + tl.load(kappa + b) * c)
        if OVER_DISTANCE:
            c = tl.where(distance > 0, c / distance, 0.0)
    at = rows.to(tl.int64)[:, None] * M + columns[None, :]
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    tl.store(out + b * N * M + at, c, mask=inside)
