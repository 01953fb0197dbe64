//! What kernels of `nn.cu` and `attention.cu` are told: where values lie, how many there are, and who takes which.
//!
//! Nothing here needs a GPU, so its tests run everywhere.

use candle_core::{Layout, Result, Tensor, bail};

/// Threads of a block at most, for which kernels were compiled.
const BLOCK: u64 = 256;
/// Threads of a block that holds several short rows.
const SHORT: u64 = 128;
/// Columns and channels of a tile.
const TILE: u64 = 32;
/// Vectors of a row that a thread keeps.
const HELD: u64 = 4;
/// Blocks along x where threads step over columns.
const GRID_X: u64 = 1 << 20;
/// Blocks along y, the limit of the hardware.
const GRID_Y: u64 = 65_535;
/// Queries of a block of attention.
const QUERIES: u64 = 128;
/// Items that one launch of attention computes at most.
pub(super) const ITEMS: usize = 16;
/// Rows, and columns of a row, that kernels count in 32 bits.
const MOST: u64 = 1 << 31;

/// A kernel's argument: the struct of that name in `nn.cu` or `attention.cu`. All fields have 64 bits, or are some that
/// have.
macro_rules! argument {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ident),* $(,)? }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        pub(super) struct $name { $(pub(super) $field: $type),* }

        #[cfg(feature = "cuda")]
        // SAFETY: numbers of 64 bits one behind another, as kernels have them.
        unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for $name {}

        #[cfg(test)]
        impl $name {
            const FIELDS: &'static [(&'static str, &'static str)] =
                &[$((stringify!($field), stringify!($type))),*];
        }
    };
}

argument! {
    /// Rows that are normalised, scaled, turned and put somewhere else.
    Rows {
        x: u64, weight: u64, bias: u64, scale: u64, shift: u64, cos: u64, sin: u64, out: u64,
        rows: u64, tokens: u64, heads: u64, width: u64,
        x_item: u64, x_token: u64, x_head: u64,
        out_item: u64, out_token: u64, out_head: u64,
        scale_item: u64, shift_item: u64, eps: f64,
    }
}

argument! {
    /// Heads of queries and of keys that are normalised and turned where they lie.
    Turn {
        q: u64, q_weight: u64, k_weight: u64, cos: u64, sin: u64,
        rows: u64, tokens: u64, heads: u64, width: u64, item: u64, token: u64, key: u64, eps: f64,
    }
}

argument! {
    /// `x + gate · y`.
    Gate {
        x: u64, y: u64, gate: u64, out: u64, rows: u64, tokens: u64, width: u64,
        x_item: u64, x_token: u64, y_item: u64, y_token: u64, gate_item: u64,
    }
}

argument! {
    /// The norm of rows, or of `x + gate · y`.
    GateNorm {
        x: u64, y: u64, gate: u64, scale: u64, shift: u64, sum: u64, out: u64, row_scales: u64,
        rows: u64, tokens: u64, width: u64, x_item: u64, x_token: u64, y_item: u64, y_token: u64,
        gate_item: u64, scale_item: u64, shift_item: u64, eps: f64,
    }
}

/// A number for each of the axes that a tensor may have.
pub(super) type Axes = [u64; 6];

/// `layout`'s dimensions and strides, neighbours that lie as one axis joined, behind those of axes that it does not have; `None`
/// for more axes than kernels know.
pub(super) fn axes(layout: &Layout) -> Option<[Axes; 2]> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (&n, &stride) in layout.dims().iter().zip(layout.stride()) {
        let (n, stride) = (n as u64, stride as u64);
        match joined.last_mut() {
            _ if n == 1 => {}
            Some(last) if last.1 == n * stride => *last = (last.0 * n, stride),
            _ => joined.push((n, stride)),
        }
    }
    let (mut dims, mut strides): (Axes, Axes) = ([1; 6], [0; 6]);
    let ones = dims.len().checked_sub(joined.len())?;
    for (at, (n, stride)) in joined.into_iter().enumerate() {
        (dims[ones + at], strides[ones + at]) = (n, stride);
    }
    Some([dims, strides])
}

argument! {
    /// `x + factor · y`.
    Add {
        x: u64, y: u64, out: u64, len: u64, alike: u64, dims: Axes, strides: Axes, factor: f64,
    }
}

argument! {
    /// softmax(x · scale + biases) along rows, in their place.
    Softmax {
        x: u64, a: u64, b: u64, rows: u64, heads: u64, queries: u64, width: u64,
        a_item: u64, a_head: u64, a_query: u64, b_item: u64, b_head: u64, b_query: u64, scale: f64,
    }
}

argument! {
    /// Lines of a table.
    Look { table: u64, ids: u64, out: u64, lines: u64, rows: u64, width: u64 }
}

argument! {
    /// Values that lie apart, side by side.
    Gather { x: u64, out: u64, len: u64, dims: Axes, strides: Axes }
}

argument! {
    /// An activation function of each value, times another.
    Activate {
        x: u64, times: u64, out: u64, rows: u64, width: u64, x_row: u64, times_row: u64, out_row: u64,
    }
}

argument! {
    /// GroupNorm, for its three kernels.
    Group {
        x: u64, weight: u64, bias: u64, out: u64, pieces: u64, moments: u64,
        groups: u64, pieces_of_group: u64, channels: u64, of_group: u64, plane: u64, eps: f64,
    }
}

argument! {
    /// Pixels of pictures, whose channels are planes, as rows of channels, and back.
    Pixels {
        x: u64, bias: u64, out: u64, items: u64, given: u64, channels: u64, padded: u64,
        height: u64, width: u64, rows: u64, columns: u64,
        row: u64, before: u64, repeat: u64, nearest: u64,
    }
}

/// Keys that items of a batch see.
pub(super) type Lengths = [u64; ITEMS];

argument! {
    /// softmax(q · kᵀ · scale) · v.
    Attention {
        q: u64, k: u64, v: u64, out: u64, heads: u64, sharing: u64, queries: u64, dim: u64,
        q_item: u64, q_head: u64, q_token: u64, k_item: u64, k_head: u64, k_token: u64,
        v_item: u64, v_head: u64, v_token: u64, scale: f64, keys: Lengths,
    }
}

/// Heads of attention as a kernel has them, which fills up those that have fewer values; `None` for wider ones.
pub(super) fn head_width(dim: u64) -> Option<u64> {
    [64, 128].into_iter().find(|&width| dim <= width)
}

/// The bytes of a block's queries, in heads of two bytes each and as wide as kernels have them.
pub(super) fn query_bytes(width: u64) -> u32 {
    (QUERIES * width * 2) as u32
}

/// `t`, or a copy of it whose values lie side by side: on GPUs by the kernel, since the library's would be compiled first.
pub(super) fn contiguous(t: &Tensor) -> Result<Tensor> {
    if t.is_contiguous() { Ok(t.clone()) } else { copied(t) }
}

/// A copy of `t` whose values lie side by side.
pub(super) fn copied(t: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if !t.is_contiguous()
        && let Some(copy) = super::copies::contiguous(t)?
    {
        return Ok(copy);
    }
    t.force_contiguous()
}

/// `t` where its rows are vectors of `each` values that begin where vectors may: as it is, or a copy.
pub(super) fn vectors(t: &Tensor, each: u64) -> Result<Tensor> {
    let each = each as usize;
    let Some((last, apart)) = t.stride().split_last() else { return Ok(t.clone()) };
    let mut apart = t.dims().iter().zip(apart);
    let regular = *last == 1
        && t.layout().start_offset().is_multiple_of(each)
        && apart.all(|(&n, stride)| n == 1 || (*stride > 0 && stride.is_multiple_of(each)));
    if regular { Ok(t.clone()) } else { copied(t) }
}

/// Blocks of a grid and threads of a block, along x and y.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) blocks: (u32, u32),
    pub(super) threads: (u32, u32),
}

impl Grid {
    /// For kernels that reduce rows of `width`, of which a thread takes `vector` at a time: a y row of a block is
    /// one of `rows`.
    pub(super) fn of_rows(rows: u64, width: u64, vector: u64) -> Self {
        let vectors = width.div_ceil(vector);
        let lanes = match vectors {
            ..=32 => vectors.next_power_of_two(),
            _ => vectors.div_ceil(HELD).next_power_of_two().clamp(32, BLOCK),
        };
        // Rows of more than one warp have a block of their own.
        let beside = if lanes > 32 { 1 } else { SHORT / lanes };
        let blocks = rows.div_ceil(beside).clamp(1, MOST - 1);
        Self { blocks: (blocks as u32, 1), threads: (lanes as u32, beside as u32) }
    }

    /// For kernels whose x runs over the vectors of a row, `ahead` of them a thread, and y over rows.
    pub(super) fn of_columns(rows: u64, width: u64, ahead: u64, vector: u64) -> Self {
        let vectors = width.div_ceil(vector).max(1);
        let lanes = vectors.min(SHORT).next_power_of_two();
        let beside = SHORT / lanes;
        let x = vectors.div_ceil(ahead * lanes).clamp(1, GRID_X);
        let y = rows.div_ceil(beside).clamp(1, GRID_Y);
        Self { blocks: (x as u32, y as u32), threads: (lanes as u32, beside as u32) }
    }

    /// For kernels that take tiles of so many columns and channels, row by row.
    pub(super) fn of_tiles(columns: u64, channels: u64, rows: u64) -> Self {
        let tiles = columns.div_ceil(TILE).saturating_mul(channels.div_ceil(TILE));
        let blocks = (tiles.clamp(1, GRID_X) as u32, rows.clamp(1, GRID_Y) as u32);
        Self { blocks, threads: (TILE as u32, (BLOCK / TILE) as u32) }
    }

    /// For attention, whose blocks have queries of one head; `None` if there are more than kernels count.
    pub(super) fn of_queries(queries: u64, heads: u64) -> Option<Self> {
        let blocks = queries.div_ceil(QUERIES).saturating_mul(heads);
        let counted = queries < MOST && (1..MOST).contains(&blocks);
        counted.then_some(Self { blocks: (blocks as u32, 1), threads: (SHORT as u32, 1) })
    }

    /// For kernels of GroupNorm that take a piece or a group a block.
    pub(super) fn of_pieces(pieces: u64) -> Self {
        Self { blocks: (pieces.clamp(1, MOST - 1) as u32, 1), threads: (BLOCK as u32, 1) }
    }
}

/// The values of a piece of a group.
pub(super) fn piece_values(vector: u64) -> u64 {
    HELD * vector * BLOCK
}

/// Whether kernels count so many.
pub(super) fn counted(n: u64) -> bool {
    n < MOST
}

/// Refuses what kernels could not count.
pub(super) fn countable(rows: u64, width: u64) -> Result<()> {
    if rows >= MOST || width >= MOST {
        bail!("nn: {rows} rows of {width} values are more than kernels count");
    }
    Ok(())
}

/// `[items, tokens, width]` as rows whose values lie side by side.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) tensor: Tensor,
    pub(super) items: u64,
    pub(super) tokens: u64,
    pub(super) width: u64,
    /// Strides in elements, 0 where there is one.
    pub(super) item: u64,
    pub(super) token: u64,
}

impl Lines {
    /// Takes a tensor of any rank; copied if values of a row do not lie side by side, or if it is
    /// strided and has other than three dimensions.
    pub(super) fn of(x: &Tensor) -> Result<Self> {
        let width = x.dims().last().copied().unwrap_or(1);
        let tensor = match x.rank() {
            3 if x.stride()[2] == 1 || width <= 1 => x.clone(),
            3 => contiguous(x)?,
            _ => contiguous(x)?.reshape((1, x.elem_count() / width.max(1), width))?,
        };
        let (items, tokens, width) = tensor.dims3()?;
        let stride = |dim: usize, of: usize| if of > 1 { tensor.stride()[dim] as u64 } else { 0 };
        let (item, token) = (stride(0, items), stride(1, tokens));
        let [items, tokens, width] = [items, tokens, width].map(|n| n as u64);
        countable(items.saturating_mul(tokens), width)?;
        Ok(Self { tensor, items, tokens, width, item, token })
    }

    pub(super) fn rows(&self) -> u64 {
        self.items * self.tokens
    }

    /// The step from row to row, where it is the same everywhere.
    pub(super) fn step(&self) -> Option<u64> {
        match (self.items, self.tokens) {
            (_, 1) => Some(self.item),
            (1, _) => Some(self.token),
            (_, tokens) => (self.item == tokens * self.token).then_some(self.token),
        }
    }
}

/// One row of values for each item, `[items, width]`.
#[derive(Debug)]
pub(super) struct PerItem {
    pub(super) tensor: Tensor,
    /// The stride in elements, 0 if there is one item.
    pub(super) item: u64,
}

impl PerItem {
    pub(super) fn of(x: &Tensor) -> Result<Self> {
        let (items, width) = x.dims2()?;
        let tensor = if x.stride()[1] == 1 || width <= 1 { x.clone() } else { contiguous(x)? };
        let item = if items > 1 { tensor.stride()[0] as u64 } else { 0 };
        Ok(Self { tensor, item })
    }
}

/// Rows of one step from each to the next.
#[derive(Debug)]
pub(super) struct Flat {
    pub(super) tensor: Tensor,
    pub(super) rows: u64,
    pub(super) width: u64,
    /// In elements.
    pub(super) step: u64,
}

impl Flat {
    /// The values of tensors of one shape: as one row where all lie side by side, else as rows.
    pub(super) fn alike(all: &[&Tensor]) -> Result<Vec<Self>> {
        let one = |x: &&Tensor| {
            Ok(Self { rows: 1, width: x.elem_count() as u64, step: 0, tensor: (*x).clone() })
        };
        match all.iter().all(|x| x.is_contiguous()) {
            true => all.iter().map(one).collect(),
            false => all.iter().map(|x| Self::rows(x)).collect(),
        }
    }

    /// `[batch, tokens, width]` as rows, copied if their steps differ.
    pub(super) fn rows(x: &Tensor) -> Result<Self> {
        let lines = Lines::of(x)?;
        let (lines, step) = match lines.step() {
            Some(step) => (lines, step),
            None => {
                let lines = Lines::of(&contiguous(x)?)?;
                let step = lines.width;
                (lines, step)
            }
        };
        let (rows, width) = (lines.rows(), lines.width);
        Ok(Self { rows, width, step, tensor: lines.tensor })
    }
}

/// The element behind the last one that `layout` shows.
pub(super) fn end(layout: &Layout) -> usize {
    if layout.dims().contains(&0) {
        return layout.start_offset();
    }
    let last: usize =
        layout.dims().iter().zip(layout.stride()).map(|(n, step)| (n - 1) * step).sum();
    layout.start_offset() + last + 1
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    /// What kernels are compiled of.
    const SOURCES: &str = concat!(include_str!("nn.cu"), include_str!("attention.cu"));

    /// The fields of `name` there, with the types that they have here.
    fn fields_of(name: &str) -> Vec<(String, String)> {
        let body = SOURCES.split(&format!("\nstruct {name} {{\n")).nth(1).expect("a struct");
        let body = body.split("};").next().expect("its end");
        let field = |line: &str| {
            let code = line.split("//").next()?.trim().strip_suffix(';')?;
            let (kind, field) = code.rsplit_once([' ', '*'])?;
            let kind = match kind {
                "double" => "f64",
                "u64" => "u64",
                "Lengths" => "Lengths",
                "Axes" => "Axes",
                pointer if code.contains('*') && !pointer.is_empty() => "u64",
                other => panic!("{other} in {name}"),
            };
            Some((field.to_string(), kind.to_string()))
        };
        body.lines().filter_map(field).collect()
    }

    #[test]
    fn arguments_are_what_kernels_read() {
        fn check(name: &str, fields: &[(&str, &str)], size: usize) {
            let ours: Vec<(String, String)> =
                fields.iter().map(|(field, kind)| (field.to_string(), kind.to_string())).collect();
            assert_eq!(ours, fields_of(name), "{name}");
            let numbers = |kind: &str| match kind {
                "Lengths" => ITEMS,
                "Axes" => size_of::<Axes>() / 8,
                _ => 1,
            };
            let numbers: usize = fields.iter().map(|(_, kind)| numbers(kind)).sum();
            assert_eq!(size, 8 * numbers, "{name}");
        }
        check("Rows", Rows::FIELDS, size_of::<Rows>());
        check("Turn", Turn::FIELDS, size_of::<Turn>());
        check("Gate", Gate::FIELDS, size_of::<Gate>());
        check("GateNorm", GateNorm::FIELDS, size_of::<GateNorm>());
        check("Add", Add::FIELDS, size_of::<Add>());
        check("Activate", Activate::FIELDS, size_of::<Activate>());
        check("Group", Group::FIELDS, size_of::<Group>());
        check("Pixels", Pixels::FIELDS, size_of::<Pixels>());
        check("Softmax", Softmax::FIELDS, size_of::<Softmax>());
        check("Look", Look::FIELDS, size_of::<Look>());
        check("Gather", Gather::FIELDS, size_of::<Gather>());
        check("Attention", Attention::FIELDS, size_of::<Attention>());
        for line in [
            "constexpr u32 HELD = 4;",
            "constexpr u32 PIECE = 256;",
            "constexpr u32 TILE = 32;",
            "constexpr u32 ITEMS = 16;",
            "constexpr u32 AXES = 6;",
            "constexpr u32 THREADS = 128;",
            "constexpr u32 QUERIES = 128,",
        ] {
            assert!(SOURCES.contains(line), "{line}");
        }
        assert_eq!((HELD, BLOCK, TILE, ITEMS, SHORT, QUERIES), (4, 256, 32, 16, 128, 128));
        assert_eq!(size_of::<Axes>(), 8 * 6);
    }

    #[test]
    fn grids_are_what_kernels_expect() {
        for vector in [4, 8] {
            for width in (1..5000).chain([8192, 16_384, 100_000, MOST - 1]) {
                let vectors = width.div_ceil(vector);
                for rows in [1, 2, 33, 4608 * 24, MOST - 1] {
                    let grid = Grid::of_rows(rows, width, vector);
                    let (lanes, beside) = (u64::from(grid.threads.0), u64::from(grid.threads.1));
                    assert!(lanes.is_power_of_two() && (lanes * beside).is_multiple_of(32));
                    assert!(lanes * beside <= BLOCK && (lanes <= 32 || beside == 1));
                    assert!(lanes * HELD >= vectors || lanes == BLOCK, "{width}");
                    assert!(u64::from(grid.blocks.0) * beside >= rows && grid.blocks.1 == 1);
                    for ahead in [1, 2] {
                        let grid = Grid::of_columns(rows, width, ahead, vector);
                        let (lanes, beside) = grid.threads;
                        assert_eq!(lanes * beside, SHORT as u32);
                        assert!((1..=GRID_Y as u32).contains(&grid.blocks.1));
                        assert!((1..=GRID_X as u32).contains(&grid.blocks.0));
                    }
                }
            }
            assert_eq!(Grid::of_columns(1, 1 << 50, 2, vector).blocks.0, GRID_X as u32);
        }
        let flux = |vector| Grid::of_rows(4608, 3072, vector);
        assert_eq!((flux(8).threads, flux(8).blocks), ((128, 1), (4608, 1)));
        assert_eq!((flux(4).threads, flux(4).blocks), ((256, 1), (4608, 1)));
        let head = Grid::of_rows(24 * 4608, 128, 8);
        assert_eq!((head.threads, head.blocks), ((16, 8), (24 * 4608 / 8, 1)));
        assert_eq!(Grid::of_tiles(33, 64, 7).blocks, (4, 7));
        assert_eq!(Grid::of_tiles(1, 1, 1 << 40).blocks, (1, GRID_Y as u32));
        assert_eq!(Grid::of_queries(4608, 24).map(|grid| grid.blocks), Some((36 * 24, 1)));
        assert_eq!(Grid::of_queries(1, 1).map(|grid| grid.blocks), Some((1, 1)));
        for (queries, heads) in [(0, 1), (1, 0), (MOST, 1), (129, 1 << 30), (1, u64::MAX)] {
            assert_eq!(Grid::of_queries(queries, heads), None);
        }
        let widths = [1, 64, 65, 128, 129].map(head_width);
        assert_eq!(widths, [Some(64), Some(64), Some(128), Some(128), None]);
        assert_eq!(Grid::of_pieces(0).blocks, (1, 1));
        assert!(Grid::of_pieces(u64::MAX).blocks.0 < 1 << 31);
    }

    #[test]
    fn ends_are_behind_the_last_element() {
        let layout = |dims: &[usize], stride: &[usize], first: usize| {
            end(&Layout::new(dims.into(), stride.to_vec(), first))
        };
        assert_eq!(layout(&[2, 3], &[3, 1], 0), 6);
        assert_eq!(layout(&[2, 3], &[10, 2], 5), 5 + 10 + 4 + 1);
        assert_eq!(layout(&[2, 0], &[3, 1], 7), 7);
        assert_eq!(layout(&[], &[], 3), 4);
        assert_eq!(layout(&[4, 1], &[0, 99], 0), 1);
    }

    #[test]
    fn rows_keep_their_strides_where_values_lie_side_by_side() -> Result<()> {
        let x = Tensor::zeros((2, 3, 8), DType::F32, &Device::Cpu)?;
        let strides = |x: &Tensor| -> Result<_> {
            let lines = Lines::of(x)?;
            Ok((lines.items, lines.tokens, lines.width, lines.item, lines.token, lines.step()))
        };
        assert_eq!(strides(&x)?, (2, 3, 8, 24, 8, Some(8)));
        assert_eq!(strides(&x.narrow(2, 4, 2)?)?, (2, 3, 2, 24, 8, Some(8)));
        assert_eq!(strides(&x.narrow(1, 1, 2)?)?, (2, 2, 8, 24, 8, None));
        assert_eq!(strides(&x.narrow(1, 1, 1)?)?, (2, 1, 8, 24, 0, Some(24)));
        assert_eq!(strides(&x.narrow(0, 1, 1)?)?, (1, 3, 8, 0, 8, Some(8)));
        // Copied: values of a row lie apart.
        assert_eq!(strides(&x.transpose(1, 2)?)?, (2, 8, 3, 24, 3, Some(3)));
        assert_eq!(strides(&x.get(0)?)?, (1, 3, 8, 0, 8, Some(8)));
        assert_eq!(strides(&x.reshape((2, 3, 2, 4))?)?, (1, 12, 4, 0, 4, Some(4)));
        assert_eq!(strides(&x.flatten_all()?)?, (1, 1, 48, 0, 0, Some(0)));
        let per_item = PerItem::of(&x.narrow(0, 1, 1)?.flatten(0, 1)?.narrow(1, 2, 4)?)?;
        assert_eq!(per_item.item, 8);
        Ok(())
    }

    #[test]
    fn axes_that_lie_as_one_are_one() -> Result<()> {
        let x = Tensor::zeros((2, 3, 4, 5), DType::F32, &Device::Cpu)?;
        let of = |x: &Tensor| axes(x.layout());
        assert_eq!(of(&x), Some([[1, 1, 1, 1, 1, 120], [0, 0, 0, 0, 0, 1]]));
        assert_eq!(of(&x.transpose(1, 2)?), Some([[1, 1, 2, 4, 3, 5], [0, 0, 60, 5, 20, 1]]));
        assert_eq!(of(&x.narrow(1, 1, 2)?), Some([[1, 1, 1, 1, 2, 40], [0, 0, 0, 0, 60, 1]]));
        let row = x.flatten_all()?.narrow(0, 0, 5)?.broadcast_as((6, 7, 5))?;
        assert_eq!(of(&row), Some([[1, 1, 1, 1, 42, 5], [0, 0, 0, 0, 0, 1]]));
        let one = x.flatten_all()?.narrow(0, 3, 1)?;
        assert_eq!(of(&one), Some([[1; 6], [0; 6]]));
        let apart = x.reshape(vec![2, 1, 3, 2, 2, 1, 5])?.permute(vec![6, 4, 3, 2, 1, 0, 5])?;
        assert_eq!(of(&apart), Some([[1, 5, 2, 2, 3, 2], [0, 1, 5, 10, 20, 60]]));
        let many = Tensor::zeros(vec![2; 7], DType::F32, &Device::Cpu)?;
        assert_eq!(of(&many.permute(vec![6, 5, 4, 3, 2, 1, 0])?), None);
        Ok(())
    }

    #[test]
    fn vectors_lie_where_they_may_begin() -> Result<()> {
        let x = Tensor::zeros((2, 3, 4, 24), DType::F32, &Device::Cpu)?;
        let kept = |x: &Tensor| -> Result<bool> {
            let y = vectors(x, 8)?;
            assert_eq!((y.dims(), y.stride()[3]), (x.dims(), 1));
            Ok(y.stride() == x.stride() && y.layout().start_offset() == x.layout().start_offset())
        };
        assert!(kept(&x)? && kept(&x.transpose(1, 2)?)? && kept(&x.narrow(3, 8, 16)?)?);
        assert!(!kept(&x.narrow(3, 4, 16)?)?, "an address");
        assert!(!kept(&x.narrow(2, 0, 1)?.expand((2, 3, 4, 24))?)?, "no stride");
        assert!(!kept(&x.transpose(2, 3)?)?, "values apart");
        let narrow = Tensor::zeros((2, 3, 4, 12), DType::F32, &Device::Cpu)?;
        assert!(!kept(&narrow.narrow(3, 0, 8)?)?, "a stride");
        Ok(())
    }

    #[test]
    fn one_row_is_what_all_values_are_where_they_lie_side_by_side() -> Result<()> {
        let x = Tensor::zeros((2, 3, 8), DType::F32, &Device::Cpu)?;
        let strides = |all: &[&Tensor]| -> Result<Vec<_>> {
            Ok(Flat::alike(all)?.iter().map(|f| (f.rows, f.width, f.step)).collect())
        };
        let half = x.narrow(2, 4, 4)?;
        assert_eq!(strides(&[&x, &x])?, [(1, 48, 0), (1, 48, 0)]);
        assert_eq!(strides(&[&half, &half.contiguous()?])?, [(6, 4, 8), (6, 4, 4)]);
        // Copied: items are not as far apart as tokens.
        assert_eq!(strides(&[&x.narrow(1, 0, 2)?])?, [(4, 8, 8)]);
        Ok(())
    }
}
