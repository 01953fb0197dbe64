//! The one linear layer of all models.

use std::fmt;

use candle_core::{Module, Tensor};

use crate::{
    Codes, Epilogue, Error, Form, Input, Part, QuantTensor, Result, SideSlot, Target, TargetPart,
    Weights, formats, join_parts,
};

/// Whether a layer has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// It must be stored.
    Yes,
    /// There is none; one that is stored is not used.
    No,
}

impl From<bool> for Bias {
    fn from(yes: bool) -> Self {
        if yes { Bias::Yes } else { Bias::No }
    }
}

/// `y = x · Wᵀ + b` with a weight in any number format, plus what its side slot adds.
pub struct Linear {
    weight: Box<dyn QuantTensor>,
    bias: Option<Tensor>,
    side: SideSlot,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Opens the layers `[(name, outputs)]` below `weights` as one layer whose outputs stand one
    /// behind another; the name `""` means the path itself.
    ///
    /// # Errors
    /// A tensor that is missing, or has a shape or dtype that does not fit.
    pub fn open(
        weights: &Weights,
        layers: &[(&str, usize)],
        inputs: usize,
        bias: Bias,
    ) -> Result<Self> {
        let parts = |leaf: &str, shape: &dyn Fn(usize) -> Vec<usize>| -> Vec<Part> {
            let name = |layer: &str| match layer {
                "" => weights.full(leaf),
                layer => weights.full(format_args!("{layer}.{leaf}")),
            };
            layers.iter().map(|&(layer, n)| Part { name: name(layer), shape: shape(n) }).collect()
        };
        let rows = parts("weight", &|n| vec![n, inputs]);
        let outputs = join_parts(&rows)?[0];
        let format = formats()
            .iter()
            .find(|format| format.recognises(weights, &rows))
            .ok_or_else(|| Error::Invalid(format!("no number format for `{}`", rows[0].name)))?;
        let weight = format.open(weights, &rows)?;
        let bias = match bias {
            Bias::Yes => {
                Some(weights.source().tensor(&parts("bias", &|n| vec![n]), Form::Compute)?)
            }
            Bias::No => None,
        };
        let side = SideSlot::default();
        let mut row = 0;
        let stored = rows.iter().zip(layers).map(|(part, &(_, rows))| {
            let name = part.name.strip_suffix(".weight").unwrap_or(&part.name).to_string();
            row += rows;
            TargetPart { name, row: row - rows, rows }
        });
        let parts = stored.collect();
        weights.source().register(Target { parts, inputs, outputs, side: side.clone() });
        Ok(Self { weight, bias, side, inputs, outputs })
    }

    /// `[…, inputs]` in the compute dtype to `[…, outputs]`.
    ///
    /// # Errors
    /// An input of another width; weights that are not leased; whatever the tensor library refuses.
    pub fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == self.inputs => *last = self.outputs,
            _ => candle_core::bail!(
                "linear: input {:?}, weight [{}, {}]",
                x.dims(),
                self.outputs,
                self.inputs
            ),
        }
        // candle multiplies transposed batches wrongly on the CPU, so operands are made contiguous.
        let rows = x.elem_count() / self.inputs.max(1);
        let x = x.contiguous()?.reshape((rows, self.inputs))?;
        let y = self.weight.product(&Input::from(&x), self.bias.as_ref())?;
        self.side.apply(&x, y)?.reshape(dims)
    }

    /// The same with an epilogue behind the bias, into `y`: `[rows, outputs]`, the values of a row side by side, which may be
    /// columns of a wider tensor and shares its memory with neither `x` nor the weights. `x` has as many rows.
    ///
    /// `false`, with `y` as it was, where that takes more than one pass: on devices without such products, and while a side adds
    /// to the layer, which it would have to do before the epilogue.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward); a `y` of another shape.
    pub fn forward_into(
        &self,
        x: &Input,
        epilogue: Epilogue,
        y: &Tensor,
    ) -> candle_core::Result<bool> {
        let rows = x.dims().iter().product::<usize>() / self.inputs.max(1);
        if x.dims().last() != Some(&self.inputs) || y.dims() != [rows, self.outputs] {
            candle_core::bail!(
                "linear: input {:?}, weight [{}, {}], output {:?}",
                x.dims(),
                self.outputs,
                self.inputs,
                y.dims()
            );
        }
        if self.side.is_taken() {
            return Ok(false);
        }
        let x = match x {
            Input::Numbers(x) => &x.contiguous()?.reshape((rows, self.inputs))?.into(),
            Input::Codes(_) => x,
        };
        self.weight.product_into(x, self.bias.as_ref(), epilogue, y)
    }

    /// [`forward`](Self::forward) of either kind of input.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward).
    pub fn forward_input(&self, x: &Input) -> candle_core::Result<Tensor> {
        let rows = match x {
            Input::Numbers(x) => return self.forward(x),
            // A side reads numbers.
            Input::Codes(_) if self.side.is_taken() => return self.forward(&x.numbers()?),
            Input::Codes(rows) => rows,
        };
        let mut dims = rows.dims.clone();
        match dims.last_mut() {
            Some(last) if *last == self.inputs => *last = self.outputs,
            _ => candle_core::bail!(
                "linear: input {:?}, weight [{}, {}]",
                rows.dims,
                self.outputs,
                self.inputs
            ),
        }
        self.weight.product(x, self.bias.as_ref())?.reshape(dims)
    }

    /// The codes that the product makes of an input like `x`, `[…, inputs]`, before it multiplies; `None` where it takes
    /// numbers, and while a side adds to the layer, which reads numbers.
    pub fn reads(&self, x: &Input) -> Option<Codes> {
        let fits = x.dims().last() == Some(&self.inputs) && !self.side.is_taken();
        if fits { self.weight.reads(x) } else { None }
    }

    /// The width of the input.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The width of the output.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The weight that this stands for, dense `[outputs, inputs]`.
    ///
    /// # Errors
    /// Weights that are not leased.
    pub fn decode(&self) -> candle_core::Result<Tensor> {
        self.weight.decode()
    }

    /// The name of the weight's number format.
    pub fn format(&self) -> &'static str {
        self.weight.format()
    }

    /// The slot that adapters are put into.
    pub fn side(&self) -> &SideSlot {
        &self.side
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Linear::forward(self, x)
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inputs, outputs, .. } = self;
        write!(f, "Linear({inputs} -> {outputs}, {}, {:?})", self.format(), self.side)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device};

    use super::*;
    use crate::{CodedRows, MemorySource, Side};

    fn weights() -> Result<Weights> {
        let dev = Device::Cpu;
        let rand = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &dev);
        Ok(Weights::new(
            MemorySource::new(&dev)
                .with("q.weight", rand(&[5, 7])?.to_dtype(DType::BF16)?)
                .with("q.bias", rand(&[5])?)
                .with("k.weight", rand(&[3, 7])?.to_dtype(DType::BF16)?)
                .with("k.bias", rand(&[3])?),
        ))
    }

    #[test]
    fn joined_layers_equal_the_single_ones() -> Result<()> {
        let w = weights()?;
        let joined = w.linear_joined(&[("q", 5), ("k", 3)], 7, Bias::Yes)?;
        let (q, k) = (w.pp("q").linear(7, 5, Bias::Yes)?, w.pp("k").linear(7, 3, Bias::Yes)?);
        // Batch 2 and a transposed view: the case that candle's own product gets wrong.
        let x = Tensor::randn(0f32, 1., (2, 7, 4), &Device::Cpu)?.transpose(1, 2)?;
        let expected = Tensor::cat(&[q.forward(&x)?, k.forward(&x)?], 2)?;
        let y = joined.forward(&x)?;
        assert_eq!(y.dims(), [2, 4, 8]);
        let worst = (y - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 1e-6, "{worst}");
        Ok(())
    }

    #[test]
    fn wrong_widths_and_missing_tensors_are_named() -> Result<()> {
        let w = weights()?;
        let error = w.pp("q").linear(8, 5, Bias::Yes).unwrap_err().to_string();
        assert!(
            error.contains("`q.weight`") && error.contains("[5, 7]") && error.contains("[5, 8]")
        );
        let error = w.pp("v").linear(7, 5, Bias::Yes).unwrap_err().to_string();
        assert!(error.contains("`v.weight`"), "{error}");
        let layer = w.pp("q").linear(7, 5, Bias::Yes)?;
        assert!(layer.forward(&Tensor::zeros((1, 6), DType::F32, &Device::Cpu)?).is_err());
        Ok(())
    }

    #[test]
    fn codes_stand_for_numbers() -> Result<()> {
        let layer = weights()?.pp("q").linear(7, 5, Bias::Yes)?;
        let dev = Device::Cpu;
        for of in [Codes::Int8, Codes::Fp8] {
            // 2, 1 and -1 as either has them, times 0.5 and 3.
            let [two, one, less]: [u8; 3] =
                if of == Codes::Int8 { [2, 1, 255] } else { [0x40, 0x38, 0xb8] };
            let codes = [[two, one, less, 0, 0, one, one], [one, two, 0, less, less, 0, two]];
            let input = Input::Codes(CodedRows {
                of,
                codes: Tensor::new(&codes, &dev)?,
                scales: Tensor::new(&[[0.5f32], [3.]], &dev)?,
                dtype: DType::F32,
                dims: vec![1, 2, 7],
            });
            let numbers = [[[1f32, 0.5, -0.5, 0., 0., 0.5, 0.5], [3., 6., 0., -3., -3., 0., 6.]]];
            assert_eq!(input.numbers()?.to_vec3::<f32>()?, numbers);
            let x = Tensor::new(&numbers, &dev)?;
            let (want, got) = (layer.forward(&x)?, layer.forward_input(&input)?);
            assert_eq!(got.to_vec3::<f32>()?, want.to_vec3::<f32>()?);
            // The CPU makes no codes of its input, and writes no columns.
            assert_eq!((layer.reads(&x.into()), layer.reads(&input)), (None, None));
            let y = Tensor::zeros((2, 5), DType::F32, &dev)?;
            assert!(!layer.forward_into(&input, Epilogue::None, &y)?);
        }
        Ok(())
    }

    #[test]
    fn the_side_slot_adds_until_it_is_cleared() -> Result<()> {
        struct One;
        impl Side for One {
            fn add(&self, _: &Tensor, y: Tensor) -> candle_core::Result<Tensor> {
                y + 1.
            }
        }
        let layer = weights()?.pp("q").linear(7, 5, Bias::No)?;
        let x = Tensor::randn(0f32, 1., (2, 7), &Device::Cpu)?;
        let plain = layer.forward(&x)?.to_vec2::<f32>()?;
        layer.side().set(Arc::new(One));
        let with: Vec<Vec<f32>> =
            plain.iter().map(|row| row.iter().map(|v| v + 1.).collect()).collect();
        assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, with);
        layer.side().clear();
        assert_eq!(layer.forward(&x)?.to_vec2::<f32>()?, plain);
        Ok(())
    }
}
