//! `x · Wᵀ (+ bias)` in bf16 and f16 by one call of cublasLt, summed in f32 and rounded once.
//!
//! The same shape gets the same algorithm, hence the same bits, on one card with one library: algorithms are
//! asked for by shape, dtype, presence of a bias and epilogue alone, never by address or free memory, and none is
//! taken that adds up parts in an order of chance or, but for e4m3, in less than f32. That holds because operands always begin
//! at multiples of 16 bytes: those that do not are copied. Calls are queued on candle's stream and
//! never synchronize the host.
//!
//! Operands may be e4m3 with an f32 scale for each row of `x` and each output (`fp8.rs` makes them so). Tensor cores add up such
//! products in fewer bits than f32 has ("fast accumulation"): sums in full f32 took 13 to 27 % longer on an H100 and were off by
//! 0.17 % in place of 0.18 to 0.28 %, where e4m3 itself costs 3.7 %.
//!
//! [`product_into`] writes columns of an output that is there already, with an activation if it is wanted;
//! [`add_product`] adds to some, for low-rank side paths.
//!
//! The library thinks in columns: a row-major `[rows, columns]` tensor is to it a matrix of `columns` rows. So `W`
//! comes first and transposed, `x` second as it is, and what comes out has a row for each output, which is
//! how the library wants biases too.

use std::{
    cell::Cell,
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, LazyLock},
};

use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, DType, Device, Error, InplaceOp1, Layout, Result, Storage,
    Tensor,
    backend::BackendStorage,
    bail,
    cuda_backend::{
        CudaDType, WrapErr,
        cudarc::{
            cublas::sys::cublasOperation_t,
            cublaslt::{
                result::{self, CublasError},
                sys,
            },
            driver::{
                CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr,
                SyncOnDrop,
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            },
        },
    },
};
use half::{bf16, f16};
use parking_lot::Mutex;

use super::output::{fresh, into};
use crate::Epilogue;

/// Operands begin at multiples of so many bytes: a vector of the kernels, and the least that all fast ones want.
pub(super) const ALIGNED: u32 = 16;

/// `x · wᵀ (+ bias)` as a fresh `[rows, outputs]`: `x` `[rows, inputs]`, `w` `[outputs, inputs]` and `bias`
/// `[outputs]` are contiguous, of one dtype and on one device. `None` for other dtypes than bf16 and f16, for empty
/// tensors and for shapes that the library offers nothing for.
pub(crate) fn product(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let shape = (x.dim(0)?, w.dim(0)?);
    fresh(x.device(), x.dtype(), shape, |y| product_into(x, w, bias, Epilogue::None, y))
}

/// The same with an epilogue into `y`, as [`into`] takes it; `false`, with `y` as it was, for what [`product`] answers
/// with `None`, and where [`into`] says so.
pub(crate) fn product_into(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    epilogue: Epilogue,
    y: &Tensor,
) -> Result<bool> {
    match x.dtype() {
        DType::BF16 => product_of::<bf16>(x, w, bias, epilogue, y),
        DType::F16 => product_of::<f16>(x, w, bias, epilogue, y),
        _ => Ok(false),
    }
}

/// The library's version, upon which the bits of products depend.
pub fn product_library() -> usize {
    // SAFETY: it only returns a number.
    unsafe { sys::cublasLtGetVersion() }
}

/// A number of 16 bits.
pub(super) trait Half: CudaDType + DeviceRepr + 'static {
    const TYPE: sys::cudaDataType;
}

impl Half for bf16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_16BF;
}

impl Half for f16 {
    const TYPE: sys::cudaDataType = sys::cudaDataType::CUDA_R_16F;
}

fn product_of<T: Half>(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    epilogue: Epilogue,
    y: &Tensor,
) -> Result<bool> {
    let ((rows, inputs), (outputs, width)) = (x.dims2()?, w.dims2()?);
    let fits = width == inputs && y.dims() == [rows, outputs];
    if !fits || bias.is_some_and(|bias| bias.dims() != [outputs]) {
        bail!(
            "linear: input {:?}, weight {:?}, bias {:?}, output {:?}",
            x.dims(),
            w.dims(),
            bias.map(Tensor::dims),
            y.dims()
        );
    }
    let Device::Cuda(device) = x.device() else {
        bail!("linear: a product of the GPU was given a tensor of another device");
    };
    if rows == 0 || outputs == 0 || inputs == 0 {
        return Ok(false);
    }
    let (x, w) = (aligned::<T>(x, device)?, aligned::<T>(w, device)?);
    let bias = bias.map(|bias| aligned::<T>(bias, device)).transpose()?;
    into::<T>(device, y, |y| {
        let stream = device.cuda_stream();
        let shape = Shape {
            rows,
            outputs,
            inputs,
            operands: Operands::Halves,
            dtype: T::TYPE,
            bias: bias.is_some(),
            epilogue,
            x: Place { row: inputs, begins: ALIGNED },
            y: Place { row: y.row, begins: ALIGNED },
        };
        // All stay locked until the product is queued.
        let (x, w) = (x.storage_and_layout(), w.storage_and_layout());
        let bias = bias.as_ref().map(Tensor::storage_and_layout);
        let (x, _x) = address::<T>(&x.0, x.1, &stream)?;
        let (w, _w) = address::<T>(&w.0, w.1, &stream)?;
        let (bias, _bias) = match &bias {
            Some(bias) => Some(address::<T>(&bias.0, bias.1, &stream)?).unzip(),
            None => (None, None),
        };
        let at = Addresses { x, w, scales: None, bias, y: y.address };
        // SAFETY: `address` and `into` held the operands to their memory, and their shapes are those of `shape`. All lie
        // on `stream`'s device, are ordered by it, and `y` is borrowed mutably, so overlaps nothing.
        unsafe { run(device, &stream, shape, &at, (1., 0.)) }
    })
}

/// Adds `scale · t[:, first..] · bᵀ` to the columns of `y` from `column` on, in place: `y` `[rows, width]`, `t`
/// `[rows, ranks]` and `b` `[outputs, inputs]` are contiguous and of one dtype, `b` reads the `inputs` columns of `t`
/// from `first` on, and `y` shares its memory with neither. `false`, with `y` as it was, for what [`product`]
/// answers with `None`, and where `y` does not begin at a multiple of 16 bytes.
pub(crate) fn add_product(
    (t, first): (&Tensor, usize),
    b: &Tensor,
    scale: f32,
    (y, column): (&Tensor, usize),
) -> Result<bool> {
    let add = AddProduct { t, first, b, scale, column, done: Cell::new(false) };
    y.inplace_op1(&add)?;
    Ok(add.done.get())
}

/// [`add_product`] as a custom operation, because only those may write.
struct AddProduct<'a> {
    t: &'a Tensor,
    first: usize,
    b: &'a Tensor,
    scale: f32,
    column: usize,
    done: Cell<bool>,
}

impl InplaceOp1 for AddProduct<'_> {
    fn name(&self) -> &'static str {
        "add product"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("a product of the GPU was given a tensor of another device")
    }

    fn cuda_fwd(&self, y: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.done.set(match y.dtype() {
            DType::BF16 => self.run::<bf16>(y, layout)?,
            DType::F16 => self.run::<f16>(y, layout)?,
            _ => false,
        });
        Ok(())
    }
}

impl AddProduct<'_> {
    fn run<T: Half>(&self, y: &mut CudaStorage, layout: &Layout) -> Result<bool> {
        let Self { t, first, b, scale, column, .. } = *self;
        let ((rows, width), (lines, ranks)) = (layout.shape().dims2()?, t.dims2()?);
        let (outputs, inputs) = b.dims2()?;
        let within = |from: usize, len, all| from.checked_add(len).is_some_and(|end| end <= all);
        if lines != rows || !within(column, outputs, width) || !within(first, inputs, ranks) {
            bail!(
                "low rank: [{rows}, {width}] from {column}, {:?} from {first}, {:?}",
                t.dims(),
                b.dims()
            );
        }
        if rows == 0 || outputs == 0 || inputs == 0 {
            return Ok(false);
        }
        let device = y.device().clone();
        let stream = device.cuda_stream();
        let (t, b) = (aligned::<T>(t, &device)?, aligned::<T>(b, &device)?);
        let shape = Shape {
            rows,
            outputs,
            inputs,
            operands: Operands::Halves,
            dtype: T::TYPE,
            bias: false,
            epilogue: Epilogue::None,
            x: Place { row: ranks, begins: begins::<T>(first) },
            y: Place { row: width, begins: begins::<T>(column) },
        };
        // Both stay locked until the product is queued.
        let (t, b) = (t.storage_and_layout(), b.storage_and_layout());
        let (t, _t) = address::<T>(&t.0, t.1, &stream)?;
        let (w, _w) = address::<T>(&b.0, b.1, &stream)?;
        let values = y.as_cuda_slice_mut::<T>()?;
        let Some((start, _)) = layout.contiguous_offsets().filter(|&(_, end)| end <= values.len())
        else {
            bail!("low rank: the output is not contiguous or not bound");
        };
        let (y, _y) = values.device_ptr_mut(&stream);
        let y = y + (start * size_of::<T>()) as u64;
        if !is_multiple(y, ALIGNED) {
            return Ok(false);
        }
        let x = t + (first * size_of::<T>()) as u64;
        let y = y + (column * size_of::<T>()) as u64;
        let at = Addresses { x, w, scales: None, bias: None, y };
        // SAFETY: all three were held to their memory, and the columns to their rows above. All lie on `stream`'s
        // device and are ordered by it; `y` is borrowed mutably, so overlaps nothing.
        unsafe { run(&device, &stream, shape, &at, (scale, 1.)) }
    }
}

/// What a place so many values behind an aligned one is a multiple of, at most [`ALIGNED`] bytes.
fn begins<T: Half>(values: usize) -> u32 {
    let bytes = values * size_of::<T>();
    1 << bytes.trailing_zeros().min(ALIGNED.trailing_zeros())
}

/// `tensor`, or a copy of it where it does not begin as operands must.
pub(super) fn aligned<T: CudaDType + DeviceRepr + 'static>(
    tensor: &Tensor,
    device: &CudaDevice,
) -> Result<Tensor> {
    let begins = {
        let (storage, layout) = tensor.storage_and_layout();
        address::<T>(&storage, layout, &device.cuda_stream())?.0
    };
    if is_multiple(begins, ALIGNED) { Ok(tensor.clone()) } else { tensor.force_contiguous() }
}

pub(super) fn is_multiple(address: u64, bytes: u32) -> bool {
    address.is_multiple_of(u64::from(bytes))
}

/// Where the values that a contiguous `layout` shows of `storage` begin, held to the memory that it has.
pub(super) fn address<'a, T: CudaDType + DeviceRepr + 'static>(
    storage: &'a Storage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(u64, SyncOnDrop<'a>)> {
    let Storage::Cuda(storage) = storage else {
        bail!("linear: a product of the GPU was given a tensor of another device");
    };
    if *storage.device().cuda_stream() != *stream {
        bail!("linear: operands of several devices");
    }
    let values: &CudaSlice<T> = storage.as_cuda_slice()?; // unbound memory is of another dtype
    let Some((first, _)) = layout.contiguous_offsets().filter(|&(_, end)| end <= values.len())
    else {
        bail!("linear: an operand is not contiguous or not bound");
    };
    let (address, sync) = values.device_ptr(stream);
    Ok((address + (first * size_of::<T>()) as u64, sync))
}

/// All that an algorithm is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    rows: usize,
    outputs: usize,
    inputs: usize,
    operands: Operands,
    /// Of the output, and of the bias.
    dtype: sys::cudaDataType,
    bias: bool,
    epilogue: Epilogue,
    x: Place,
    y: Place,
}

/// What is multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Operands {
    /// Numbers of the output's dtype.
    Halves,
    /// e4m3 with an f32 scale for each row and each output.
    Fp8,
}

/// How a matrix lies within its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    /// Values from one row of the tensor to the next.
    row: usize,
    /// The bytes that its address is a multiple of.
    begins: u32,
}

impl Shape {
    /// A product in e4m3 of contiguous operands that begin as all do, its output in `T` and in rows so far apart.
    pub(super) fn fp8<T: Half>(
        (rows, outputs, inputs): (usize, usize, usize),
        bias: bool,
        epilogue: Epilogue,
        row: usize,
    ) -> Self {
        Self {
            rows,
            outputs,
            inputs,
            operands: Operands::Fp8,
            dtype: T::TYPE,
            bias,
            epilogue,
            x: Place { row: inputs, begins: ALIGNED },
            y: Place { row, begins: ALIGNED },
        }
    }

    fn error(&self, what: &str, error: CublasError) -> Error {
        let Self { rows, outputs, inputs, operands, dtype, bias, epilogue, .. } = self;
        let of = if *operands == Operands::Fp8 { " of e4m3" } else { "" };
        Error::msg(format!(
            "cublasLt: {what} a product{of} of [{rows}, {inputs}] and [{outputs}, {inputs}] in {dtype:?}{}{}: {:?}",
            if *bias { " with a bias" } else { "" },
            if *epilogue == Epilogue::GeluTanh { ", GELU behind it" } else { "" },
            error.0
        ))
    }
}

/// Where the operands of a product lie on the GPU.
pub(super) struct Addresses {
    pub(super) x: u64,
    pub(super) w: u64,
    /// Those of `x` and of `w`, where the operands are e4m3.
    pub(super) scales: Option<(u64, u64)>,
    pub(super) bias: Option<u64>,
    pub(super) y: u64,
}

/// Whether the library offers something for `shape` on the GPU of `stream`.
pub(super) fn offers(stream: &CudaStream, shape: Shape) -> Result<bool> {
    let context = stream.context();
    context.bind_to_thread().w()?;
    Ok(library(&mut LIBRARIES.lock(), context)?.plan(shape)?.is_some())
}

/// The library for the context, which is the thread's current one.
fn library<'a>(
    all: &'a mut HashMap<usize, Library>,
    context: &Arc<CudaContext>,
) -> Result<&'a mut Library> {
    Ok(match all.entry(context.cu_ctx() as usize) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(Library::new(context)?),
    })
}

/// Queues a product, where the library offers one for `shape`: else `false`. `y` becomes the first factor times it
/// plus the second times `y`, which is not read if that is 0.
///
/// # Safety
/// `x` has `rows` times `inputs` values of the shape's operands, `y`, which nobody else uses, `rows` times `outputs` of its dtype,
/// both in rows as far apart as the shape says and not closer than they are long. `w` has `outputs · inputs`
/// values, and the bias, which is there if the shape says so, `outputs`. The scales of e4m3, which are there for it alone, are f32, one for
/// each row and each output. All are ordered by `stream`, which is `device`'s.
pub(super) unsafe fn run(
    device: &CudaDevice,
    stream: &CudaStream,
    shape: Shape,
    at: &Addresses,
    (alpha, beta): (f32, f32),
) -> Result<bool> {
    let whole = [at.w].into_iter().chain(at.bias).all(|address| is_multiple(address, ALIGNED));
    if !whole || !is_multiple(at.x, shape.x.begins) || !is_multiple(at.y, shape.y.begins) {
        bail!("linear: an operand does not begin at a multiple of {ALIGNED} bytes");
    }
    if at.bias.is_some() != shape.bias || at.scales.is_some() != (shape.operands == Operands::Fp8) {
        bail!("linear: a product was given other operands than its plan is for");
    }
    let context = stream.context();
    context.bind_to_thread().w()?;
    let mut all = LIBRARIES.lock();
    let library = library(&mut all, context)?;
    let handle = library.handle;
    let Some(plan) = library.plan(shape)? else { return Ok(false) };
    let failed = |error| shape.error("could not start", error);
    if let Some(bias) = at.bias {
        plan.operation.set_bias(bias).map_err(failed)?;
    }
    if let Some((x, w)) = at.scales {
        plan.operation.set_scales(w, x).map_err(failed)?;
    }
    // It goes back in the order of the stream, so behind the product.
    let mut workspace = match plan.workspace {
        0 => None,
        // SAFETY: bytes that the product writes before it reads them.
        bytes => Some(unsafe { device.alloc::<u8>(bytes)? }),
    };
    let (workspace, _workspace) = workspace.as_mut().map(|w| w.device_ptr_mut(stream)).unzip();
    // SAFETY: handle, descriptors and algorithm belong together and live as long as the process; the
    // factors are f32 on the host, as `Operation::new` says. The caller vouches for the operands, whose sizes are those
    // of the descriptors, and the workspace is as large as the algorithm wants it. The third operand may be the
    // output.
    unsafe {
        result::matmul(
            handle,
            plan.operation.0,
            (&raw const alpha).cast(),
            (&raw const beta).cast(),
            at.w as *const _,
            plan.w.0,
            at.x as *const _,
            plan.x.0,
            at.y as *const _,
            plan.y.0,
            at.y as *mut _,
            plan.y.0,
            &raw const plan.algorithm,
            workspace.unwrap_or(0) as *mut _,
            plan.workspace,
            stream.cu_stream().cast(),
        )
    }
    .map_err(failed)?;
    Ok(true)
}

/// The library by CUDA context, for the life of the process; each holds its context, so that an address never comes to
/// mean another one.
static LIBRARIES: LazyLock<Mutex<HashMap<usize, Library>>> = LazyLock::new(Mutex::default);

struct Library {
    handle: sys::cublasLtHandle_t,
    /// The most bytes that a product may have beside its operands.
    most: usize,
    /// `None` for what nothing is offered for.
    plans: HashMap<Shape, Option<Plan>>,
    _context: Arc<CudaContext>,
}

// SAFETY: the handle and the descriptors belong to no thread; they are used under the lock of `LIBRARIES` alone.
unsafe impl Send for Library {}

impl Library {
    /// The library for the context, which is the thread's current one.
    fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let handle = result::create_handle()
            .map_err(|error| Error::msg(format!("cublasLt does not start: {:?}", error.0)))?;
        // What NVIDIA advises for cuBLAS by architecture. It is fixed, since it decides which algorithms there are.
        let most = if context.attribute(MAJOR).w()? >= 9 { 32 << 20 } else { 4 << 20 };
        Ok(Self { handle, most, plans: HashMap::new(), _context: context.clone() })
    }

    /// The plan for a shape, made when it is first asked for.
    fn plan(&mut self, shape: Shape) -> Result<Option<&Plan>> {
        let plan = match self.plans.entry(shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let plan = Plan::new(self.handle, shape, self.most);
                entry.insert(plan.map_err(|error| shape.error("could not plan", error))?)
            }
        };
        Ok(plan.as_ref())
    }
}

/// What the library answers.
type Answer<T> = std::result::Result<T, CublasError>;

/// How products of one shape are computed.
struct Plan {
    operation: Operation,
    w: Matrix,
    x: Matrix,
    y: Matrix,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// The bytes that the algorithm wants beside the operands.
    workspace: usize,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, shape: Shape, most: usize) -> Answer<Option<Self>> {
        use sys::cublasStatus_t::{CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED};
        let Shape { rows, outputs, inputs, dtype, .. } = shape;
        let operation = Operation::new(shape)?;
        let of = match shape.operands {
            Operands::Halves => dtype,
            Operands::Fp8 => sys::cudaDataType::CUDA_R_8F_E4M3,
        };
        let w = Matrix::new(of, (inputs, outputs), inputs)?;
        let x = Matrix::new(of, (inputs, rows), shape.x.row)?;
        let y = Matrix::new(dtype, (outputs, rows), shape.y.row)?;
        let preference = Preference::new(most, shape.x.begins, shape.y.begins)?;
        // SAFETY: the handle and the descriptors are alive. No operand is looked at.
        let offered = unsafe {
            result::get_matmul_algo_heuristic(handle, operation.0, w.0, x.0, y.0, y.0, preference.0)
        };
        let first = match offered {
            Ok(first) => first,
            Err(CublasError(CUBLAS_STATUS_NOT_SUPPORTED | CUBLAS_STATUS_INVALID_VALUE)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        if first.workspaceSize > most || reduction(&first.algo)? & !REDUCTIONS != 0 {
            return Ok(None);
        }
        let (algorithm, workspace) = (first.algo, first.workspaceSize);
        Ok(Some(Self { operation, w, x, y, algorithm, workspace }))
    }
}

/// How parts of a sum may be put together, beside not dividing it: in f32, in a step of its own. The
/// others take turns in the output, or round the parts.
const REDUCTIONS: u32 =
    sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// How the algorithm puts parts of a sum together.
fn reduction(algorithm: &sys::cublasLtMatmulAlgo_t) -> Answer<u32> {
    use sys::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME;
    let (mut scheme, mut written) = (0u32, 0);
    // SAFETY: the library writes the attribute, which is a `u32`, and how many bytes that were.
    let status = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            algorithm,
            CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
            (&raw mut scheme).cast(),
            size_of_val(&scheme),
            &raw mut written,
        )
    };
    status.result()?;
    Ok(scheme)
}

/// What is computed of two matrices.
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(Shape { bias, epilogue, operands, .. }: Shape) -> Answer<Self> {
        use sys::{
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasLtEpilogue_t::{
                CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_GELU,
                CUBLASLT_EPILOGUE_GELU_BIAS,
            },
            cublasLtMatmulDescAttributes_t::{
                CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
                CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_FAST_ACCUM,
                CUBLASLT_MATMUL_DESC_TRANSA,
            },
            cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F,
            cudaDataType::CUDA_R_32F,
        };
        let new = Self(result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F)?);
        new.set(CUBLASLT_MATMUL_DESC_TRANSA, cublasOperation_t::CUBLAS_OP_T as i32)?;
        let behind = match (epilogue, bias) {
            (Epilogue::None, false) => CUBLASLT_EPILOGUE_DEFAULT,
            (Epilogue::None, true) => CUBLASLT_EPILOGUE_BIAS,
            // Theirs is the approximation by tanh.
            (Epilogue::GeluTanh, false) => CUBLASLT_EPILOGUE_GELU,
            (Epilogue::GeluTanh, true) => CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        new.set(CUBLASLT_MATMUL_DESC_EPILOGUE, behind as u32)?;
        if bias {
            // Planning never reads a bias, but looks at how its address is aligned: as badly as any may be.
            new.set_bias(u64::from(ALIGNED))?;
        }
        if operands == Operands::Fp8 {
            for mode in [CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE] {
                new.set(mode, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as i32)?;
            }
            // Not read either, but without an address there are no scales.
            new.set_scales(u64::from(ALIGNED), u64::from(ALIGNED))?;
            new.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, 1i8)?;
        }
        Ok(new)
    }

    fn set_bias(&self, address: u64) -> Answer<()> {
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        self.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, address)
    }

    /// Those of the first matrix, which is `w`, and of the second.
    fn set_scales(&self, w: u64, x: u64) -> Answer<()> {
        use sys::cublasLtMatmulDescAttributes_t::{
            CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
        };
        self.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, w)?;
        self.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x)
    }

    fn set<V: Copy>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: V) -> Answer<()> {
        // SAFETY: the descriptor is alive, and as many bytes are read as the value has: the library refuses
        // another size than the attribute's.
        unsafe {
            result::set_matmul_desc_attribute(
                self.0,
                attribute,
                (&raw const value).cast(),
                size_of::<V>(),
            )
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: it is this value's alone.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// How a matrix lies in memory, one column behind another.
struct Matrix(sys::cublasLtMatrixLayout_t);

impl Matrix {
    /// So many `(rows, columns)`, and values from one column to the next.
    fn new(
        dtype: sys::cudaDataType,
        (rows, columns): (usize, usize),
        apart: usize,
    ) -> Answer<Self> {
        // Tensors have less than 2^63 bytes, so no length is cut.
        result::create_matrix_layout(dtype, rows as u64, columns as u64, apart as i64).map(Self)
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        // SAFETY: it is this value's alone.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// Which algorithms are asked for.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    /// For `x` and `y` at multiples of so many bytes.
    fn new(most: usize, x: u32, y: u32) -> Answer<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t::{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as MAX_WORKSPACE,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES as ALIGNMENT_A,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES as ALIGNMENT_B,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES as ALIGNMENT_C,
            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as ALIGNMENT_D,
            CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK as REDUCTION_MASK,
        };
        let new = Self(result::create_matmul_pref()?);
        new.set(MAX_WORKSPACE, most as u64)?;
        new.set(REDUCTION_MASK, REDUCTIONS)?;
        for (operand, begins) in
            [(ALIGNMENT_A, ALIGNED), (ALIGNMENT_B, x), (ALIGNMENT_C, y), (ALIGNMENT_D, y)]
        {
            new.set(operand, begins)?;
        }
        Ok(new)
    }

    fn set<V: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: V,
    ) -> Answer<()> {
        // SAFETY: the descriptor is alive, and as many bytes are read as the value has: the library refuses
        // another size than the attribute's.
        unsafe {
            result::set_matmul_pref_attribute(
                self.0,
                attribute,
                (&raw const value).cast(),
                size_of::<V>(),
            )
        }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it is this value's alone.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
