//! From the rows of a joined projection to heads, and from a block's output back into the stream:
//! what stands between the products of a transformer block.
//!
//! Each function makes one pass over memory where the tensor library would make three to five.

use candle_core::{D, DType, Result, Tensor};
use mmgp_quant::{Input, Linear};

use crate::nn::{RmsNorm, Rope, contiguous, cpu, layer_norm_modulated_for, norms::rms_row};
#[cfg(feature = "cuda")]
use crate::nn::{cuda, norms::codes_for, rope::Pairs};

/// How heads lie in the rows of a projection: `count` heads of `dim` values each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// The number of heads.
    pub count: usize,
    /// The width of a head.
    pub dim: usize,
}

impl Heads {
    /// The width of all heads together.
    pub fn width(self) -> usize {
        self.count * self.dim
    }

    /// Takes the heads that begin at column `first` of `x`, normalises each if `norm` is given, then
    /// turns it if `rope` is given: `[batch, tokens, columns]` to `[batch, heads, tokens, dim]`. What is only taken stays
    /// where it is on a GPU, as a view of `x`.
    ///
    /// # Errors
    /// Columns, tokens or widths that do not fit; weights that are not leased.
    pub fn split(
        self,
        x: &Tensor,
        first: usize,
        norm: Option<&RmsNorm>,
        rope: Option<&Rope>,
    ) -> Result<Tensor> {
        if x.device().is_cuda()
            && norm.is_none()
            && rope.is_none()
            && let Some(heads) = self.in_place(x, first)?
        {
            return Ok(heads);
        }
        self.join(&[HeadRows { rows: x, first, norm, rope }])
    }

    /// The heads of several streams, the tokens of one behind those of another:
    /// `[batch, heads, tokens of all, dim]`.
    ///
    /// # Errors
    /// Those of [`split`](Self::split); no parts, or parts of several batch sizes.
    pub fn join(self, parts: &[HeadRows<'_>]) -> Result<Tensor> {
        for part in parts {
            self.check(part)?;
        }
        #[cfg(feature = "cuda")]
        {
            let weights = parts.iter().filter_map(|part| Some(part.norm?.weight()));
            let all: Vec<&Tensor> = parts.iter().map(|part| part.rows).chain(weights).collect();
            // The kernel turns neighbours; halves are for language models, which run once.
            let turns = |part: &HeadRows<'_>| {
                part.rope.is_none_or(|rope| rope.pairs() == Pairs::Neighbours)
            };
            if parts.iter().all(turns) && cuda::take(&all) {
                return cuda::heads(self, parts);
            }
        }
        let mut split = Vec::with_capacity(parts.len());
        for part in parts {
            split.push(self.take(part)?);
        }
        match split.len() {
            1 => Ok(split.remove(0)),
            _ => Tensor::cat(&split, 2),
        }
    }

    /// Queries, keys and values of several streams, the tokens of one behind those of another:
    /// `[batch, heads, tokens of all, dim]` each. On GPUs they may be views of one tensor, into which products write and in
    /// which a kernel turns.
    ///
    /// # Errors
    /// Those of [`join`](Self::join), and of the products; a layer with other outputs than three times as many as the
    /// heads have values.
    pub fn project(self, streams: &[Projected<'_>]) -> Result<[Tensor; 3]> {
        let width = self.width();
        for stream in streams {
            stream.held_to(self)?;
        }
        #[cfg(feature = "cuda")]
        {
            let all = streams.iter().flat_map(|stream| stream.norms.map(RmsNorm::weight));
            let all: Vec<&Tensor> = all.collect();
            let alike = |x: &Input| {
                cuda::take_input(x) && all.first().is_some_and(|norm| norm.dtype() == x.dtype())
            };
            if cuda::take(&all)
                && streams.iter().all(|stream| alike(stream.x))
                && let Some(heads) = cuda::project(self, streams)?
            {
                return Ok(heads);
            }
        }
        let rows = streams.iter().map(|stream| stream.linear.forward_input(stream.x));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let parts = |first: usize, norm: Option<usize>| {
            let mut parts = Vec::with_capacity(streams.len());
            for (rows, stream) in rows.iter().zip(streams) {
                let (norm, rope) = (norm.map(|at| stream.norms[at]), norm.map(|_| stream.rope));
                parts.push(HeadRows { rows, first, norm, rope });
            }
            parts
        };
        let v = match rows.as_slice() {
            [rows] => self.split(rows, 2 * width, None, None)?,
            _ => self.join(&parts(2 * width, None))?,
        };
        Ok([self.join(&parts(0, Some(0)))?, self.join(&parts(width, Some(1)))?, v])
    }

    /// The heads as a view of `x`, where they lie in it as in rows of heads.
    fn in_place(self, x: &Tensor, first: usize) -> Result<Option<Tensor>> {
        let (batch, tokens, columns) = x.dims3()?;
        let Self { count, dim } = self;
        if !x.is_contiguous()
            || dim == 0
            || !columns.is_multiple_of(dim)
            || !first.is_multiple_of(dim)
            || first + self.width() > columns
        {
            return Ok(None);
        }
        let heads = x.reshape((batch, tokens, columns / dim, dim))?;
        heads.narrow(2, first / dim, count)?.transpose(1, 2).map(Some)
    }

    fn check(self, part: &HeadRows<'_>) -> Result<()> {
        let &HeadRows { rows: x, first, rope, .. } = part;
        let (_, tokens, columns) = x.dims3()?;
        let Self { dim, .. } = self;
        if first + self.width() > columns || rope.is_some_and(|r| r.tokens() != tokens) {
            candle_core::bail!(
                "heads: {self:?} from column {first} of {:?}, rope for {:?} tokens",
                x.dims(),
                rope.map(Rope::tokens)
            );
        }
        if let Some(rope) = rope
            && rope.half() * 2 != dim
        {
            candle_core::bail!("heads: {self:?} with a rope for {}", rope.half() * 2);
        }
        Ok(())
    }

    /// The heads of one stream, which was checked.
    fn take(self, part: &HeadRows<'_>) -> Result<Tensor> {
        let &HeadRows { rows: x, first, norm, rope } = part;
        let (batch, tokens, columns) = x.dims3()?;
        let Self { count, dim } = self;
        if !x.device().is_cpu() || x.dtype() != DType::F32 {
            return self.split_composed(x, first, norm, rope);
        }
        let x = x.contiguous()?;
        let mut out = vec![0f32; batch * tokens * self.width()];
        let pairs = rope.map(Rope::pairs);
        let mut run = |weight: Option<(&[f32], f64)>, tables: Option<(&[f32], &[f32])>| {
            cpu::read(&x, |x| {
                cpu::rows(&mut out, dim, |i, row| {
                    let (plane, token) = (i / tokens, i % tokens);
                    let (item, head) = (plane / count, plane % count);
                    let at = (item * tokens + token) * columns + first + head * dim;
                    let x = &x[at..at + dim];
                    match weight {
                        Some((weight, eps)) => rms_row(x, weight, eps, row),
                        None => row.copy_from_slice(x),
                    }
                    if let (Some((cos, sin)), Some(pairs)) = (tables, pairs) {
                        let range = token * dim / 2..(token + 1) * dim / 2;
                        Rope::turn_row(pairs, row, &cos[range.clone()], &sin[range]);
                    }
                });
                Ok(())
            })
        };
        match (norm, rope) {
            (None, None) => run(None, None)?,
            (Some(n), None) => n.with_weight(dim, |w| run(Some((w, n.eps())), None))?,
            (None, Some(r)) => r.with_tables(|c, s| run(None, Some((c, s))))?,
            (Some(n), Some(r)) => {
                n.with_weight(dim, |w| r.with_tables(|c, s| run(Some((w, n.eps())), Some((c, s)))))?
            }
        }
        cpu::tensor(out, (batch, count, tokens, dim))
    }

    fn split_composed(
        self,
        x: &Tensor,
        first: usize,
        norm: Option<&RmsNorm>,
        rope: Option<&Rope>,
    ) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let x = contiguous(&x.narrow(D::Minus1, first, self.width())?)?;
        let mut x = x.reshape((batch, tokens, self.count, self.dim))?;
        if let Some(norm) = norm {
            x = norm.forward(&x)?;
        }
        x = contiguous(&x.transpose(1, 2)?)?;
        match rope {
            Some(rope) => rope.apply(&x),
            None => Ok(x),
        }
    }
}

/// A stream whose heads attend: the layer that makes queries, keys and values of it side by side, and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub struct Projected<'a> {
    /// Three times as many outputs as the heads have values.
    pub linear: &'a Linear,
    /// The stream, `[batch, tokens, inputs of the layer]`.
    pub x: &'a Input,
    /// Normalise each head of the queries and of the keys.
    pub norms: [&'a RmsNorm; 2],
    /// Turns them then.
    pub rope: &'a Rope,
}

impl Projected<'_> {
    /// Refuses what does not fit together, or not these heads.
    pub(crate) fn held_to(&self, heads: Heads) -> Result<()> {
        let &Self { linear, x, rope, .. } = self;
        let fits = x.dims().len() == 3
            && x.dims()[1..] == [rope.tokens(), linear.inputs()]
            && linear.outputs() == 3 * heads.width()
            && rope.half() * 2 == heads.dim;
        if !fits {
            candle_core::bail!(
                "heads: {heads:?} of {linear:?} over {:?}, rope for {} tokens of {}",
                x.dims(),
                rope.tokens(),
                rope.half() * 2
            );
        }
        Ok(())
    }
}

/// Rows of a projection, `[batch, tokens, columns]`, and what becomes of the heads in them.
#[derive(Clone, Copy, Debug)]
pub struct HeadRows<'a> {
    /// The rows.
    pub rows: &'a Tensor,
    /// The column at which the heads begin.
    pub first: usize,
    /// Normalises each head.
    pub norm: Option<&'a RmsNorm>,
    /// Turns each head then.
    pub rope: Option<&'a Rope>,
}

/// `[batch, heads, tokens, dim]` to `[batch, tokens, heads · dim]`: how attention hands its result on.
pub(crate) fn merge(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::take(&[x]) {
        return cuda::merge(x);
    }
    let (batch, heads, tokens, dim) = x.dims4()?;
    x.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, heads * dim))
}

/// `x + gate · y`: `x` and `y` are `[batch, tokens, width]`, `gate` is `[batch, width]`.
///
/// # Errors
/// Shapes that do not fit each other.
pub fn gated_add(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let (batch, tokens, width) = x.dims3()?;
    if y.dims() != x.dims() || gate.dims() != [batch, width] {
        candle_core::bail!("gated_add: {:?}, {:?}, {:?}", x.dims(), y.dims(), gate.dims());
    }
    #[cfg(feature = "cuda")]
    if cuda::take(&[x, y, gate]) {
        return cuda::gated_add(x, y, gate);
    }
    if !x.device().is_cpu() || x.dtype() != DType::F32 {
        return x + y.broadcast_mul(&gate.unsqueeze(1)?)?;
    }
    let (x, y, gate) = (x.contiguous()?, y.contiguous()?, gate.contiguous()?);
    let mut out = vec![0f32; x.elem_count()];
    cpu::read(&x, |x| {
        cpu::read(&y, |y| {
            cpu::read(&gate, |gate| {
                cpu::rows(&mut out, width, |i, row| {
                    let range = i * width..(i + 1) * width;
                    let gate = &gate[i / tokens * width..][..width];
                    let rows = x[range.clone()].iter().zip(&y[range]).zip(gate);
                    row.iter_mut().zip(rows).for_each(|(o, ((x, y), g))| *o = x + g * y);
                });
                Ok(())
            })
        })
    })?;
    cpu::tensor(out, (batch, tokens, width))
}

/// [`gated_add`], and [`layer_norm_modulated`](crate::nn::layer_norm_modulated) of that as `reader` reads it: `scale` and `shift` are `[batch, width]` too.
///
/// # Errors
/// Shapes that do not fit each other.
pub fn gated_add_norm(
    x: &Tensor,
    y: &Tensor,
    gate: &Tensor,
    modulation: [&Tensor; 2],
    eps: f64,
    reader: &Linear,
) -> Result<(Tensor, Input)> {
    #[cfg(feature = "cuda")]
    if cuda::take(&[x, y, gate, modulation[0], modulation[1]]) {
        let normed = cuda::Normed { x, gated: Some((y, gate)), modulation, eps };
        return match normed.run(codes_for(x, &[reader]))? {
            (Some(sum), input) => Ok((sum, input)),
            (None, _) => candle_core::bail!("gated_add_norm: no sum"),
        };
    }
    let sum = gated_add(x, y, gate)?;
    let normed = layer_norm_modulated_for(&sum, modulation, eps, &[reader])?;
    Ok((sum, normed))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::{MemorySource, Weights};

    use super::*;

    fn near(a: &Tensor, b: &Tensor) -> Result<()> {
        assert_eq!(a.dims(), b.dims());
        let worst = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 2e-6, "{worst}");
        Ok(())
    }

    #[test]
    fn the_kernel_equals_the_composition() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let heads = Heads { count: 3, dim: 10 };
        let x = Tensor::randn(0f32, 1., (2, 5, 67), &dev)?;
        let source = MemorySource::new(&dev).with("weight", Tensor::randn(1f32, 1., 10, &dev)?);
        let norm = RmsNorm::new(&Weights::new(source), 10, 1e-6)?;
        let ids = Tensor::randn(0f32, 9., (5, 2), &dev)?;
        let rope = Rope::new(&ids, &[4, 6], 10000., &dev)?;
        let text = Rope::of_text(5, &[1., 0.3, 0.1, 0.03, 0.01], &dev)?;
        for norm in [None, Some(&norm)] {
            for rope in [None, Some(&rope), Some(&text)] {
                let want = heads.split_composed(&x, 31, norm, rope)?;
                near(&heads.split(&x, 31, norm, rope)?, &want)?;
            }
        }
        // What is left where it lies, which only heads that begin at whole ones are.
        let rows = Tensor::randn(0f32, 1., (2, 5, 70), &dev)?;
        let view = heads.in_place(&rows, 20)?.expect("columns of heads");
        near(&view, &heads.split_composed(&rows, 20, None, None)?)?;
        for (rows, first) in [(&x, 30), (&rows, 5), (&rows, 50), (&rows.narrow(2, 0, 60)?, 0)] {
            assert!(heads.in_place(rows, first)?.is_none(), "{:?} from {first}", rows.dims());
        }
        // Two streams joined are their heads one behind another.
        let y = Tensor::randn(0f32, 1., (2, 3, 30), &dev)?;
        let part = |rows, first, rope| HeadRows { rows, first, norm: Some(&norm), rope };
        let got = heads.join(&[part(&y, 0, None), part(&x, 7, Some(&rope))])?;
        assert_eq!(got.dims(), [2, 3, 8, 10]);
        near(&got.narrow(2, 0, 3)?, &heads.split(&y, 0, Some(&norm), None)?)?;
        near(&got.narrow(2, 3, 5)?, &heads.split(&x, 7, Some(&norm), Some(&rope))?)?;
        assert!(heads.join(&[]).is_err());
        assert!(heads.join(&[part(&y.narrow(0, 0, 1)?, 0, None), part(&x, 7, None)]).is_err());
        let merged = merge(&got)?;
        assert_eq!(merged.dims(), [2, 8, 30]);
        near(&merged.narrow(2, 20, 10)?, &got.narrow(1, 2, 1)?.squeeze(1)?)?;
        assert!(heads.split(&x, 38, None, None).is_err());
        assert!(heads.split(&x, 0, None, Some(&rope.narrow(0, 4)?)).is_err());
        assert!(Heads { count: 2, dim: 12 }.split(&x, 0, None, Some(&rope)).is_err());
        Ok(())
    }

    #[test]
    fn a_gate_belongs_to_its_batch_item() -> Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let (x, y, gate) = (rand(&[2, 3, 5])?, rand(&[2, 3, 5])?, rand(&[2, 15])?);
        let gate = gate.narrow(1, 5, 5)?;
        near(&gated_add(&x, &y, &gate)?, &(&x + y.broadcast_mul(&gate.unsqueeze(1)?)?)?)?;
        assert!(gated_add(&x, &y, &x).is_err());
        Ok(())
    }
}
