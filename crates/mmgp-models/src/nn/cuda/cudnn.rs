//! [Scaled dot-product attention](https://docs.nvidia.com/deeplearning/cudnn/backend/latest/operations/Attention.html)
//! by NVIDIA's cuDNN, where it is installed.
//!
//! The library is opened when it is first asked for, so that programs start without it, and asked by its backend
//! interface, whose numbers stand here as its headers have them. The operation reads queries, keys and values
//! wherever they lie, also within the rows of a joined projection, and holds no scores in memory.
//!
//! How a shape is computed is a plan. The library makes it in about 0.1 s, and again from nothing when it is
//! asked again, so plans are kept for the life of the process.

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, c_char, c_void},
    fmt, ptr,
    sync::OnceLock,
};

use candle_core::{DType, Device, Result, Tensor, bail, cuda_backend::WrapErr};
use half::{bf16, f16};
use parking_lot::Mutex;

use super::launch::{Element, Fresh, Scratch, held_to};

/// The names that the library has, first those that are tried first.
const NAMES: [&str; 3] = ["libcudnn.so.9", "libcudnn.so", "cudnn64_9.dll"];
/// The path of the library where the loader does not find it.
const PATH: &str = "MMGP_CUDNN";
/// 9.13.1, the first version that has the operation.
const OLDEST: usize = 91_301;
/// The widest heads that it computes.
const WIDEST: usize = 256;
/// The bytes of a vector, at which rows begin.
const VECTOR: usize = 16;

type Raw = *mut c_void;

/// The types of attributes.
mod kind {
    pub(super) const HANDLE: i32 = 0;
    pub(super) const DATA_TYPE: i32 = 1;
    pub(super) const BOOLEAN: i32 = 2;
    pub(super) const INT64: i32 = 3;
    pub(super) const POINTER: i32 = 6;
    pub(super) const HEURISTIC: i32 = 8;
    pub(super) const DESCRIPTOR: i32 = 15;
}

/// What descriptors describe.
mod of {
    pub(super) const ENGINE: i32 = 3;
    pub(super) const HEURISTICS: i32 = 4;
    pub(super) const PLAN: i32 = 5;
    pub(super) const GRAPH: i32 = 15;
    pub(super) const VARIANT: i32 = 16;
    pub(super) const TENSOR: i32 = 17;
    pub(super) const ATTENTION: i32 = 41;
}

/// The attributes of descriptors.
mod attribute {
    pub(super) const HEURISTICS_MODE: i32 = 200;
    pub(super) const HEURISTICS_GRAPH: i32 = 201;
    pub(super) const HEURISTICS_RESULTS: i32 = 202;
    pub(super) const PLAN_HANDLE: i32 = 400;
    pub(super) const PLAN_ENGINE: i32 = 401;
    pub(super) const PLAN_WORKSPACE: i32 = 402;
    pub(super) const GRAPH_HANDLE: i32 = 800;
    pub(super) const GRAPH_OPERATIONS: i32 = 801;
    pub(super) const TENSOR_ALIGNMENT: i32 = 900;
    pub(super) const TENSOR_TYPE: i32 = 901;
    pub(super) const TENSOR_DIMS: i32 = 902;
    pub(super) const TENSOR_STRIDES: i32 = 903;
    pub(super) const TENSOR_ID: i32 = 906;
    pub(super) const TENSOR_BY_VALUE: i32 = 908;
    pub(super) const VARIANT_IDS: i32 = 1000;
    pub(super) const VARIANT_POINTERS: i32 = 1001;
    pub(super) const VARIANT_WORKSPACE: i32 = 1003;
    pub(super) const ATTENTION_Q: i32 = 2800;
    pub(super) const ATTENTION_K: i32 = 2801;
    pub(super) const ATTENTION_V: i32 = 2802;
    pub(super) const ATTENTION_O: i32 = 2803;
    pub(super) const ATTENTION_SCALE: i32 = 2805;
}

/// The library's functions that are called.
struct Library {
    version: unsafe extern "C" fn() -> usize,
    last_error: unsafe extern "C" fn(*mut c_char, usize),
    create: unsafe extern "C" fn(*mut Raw) -> i32,
    set_stream: unsafe extern "C" fn(Raw, Raw) -> i32,
    create_descriptor: unsafe extern "C" fn(i32, *mut Raw) -> i32,
    destroy_descriptor: unsafe extern "C" fn(Raw) -> i32,
    set_attribute: unsafe extern "C" fn(Raw, i32, i32, i64, *const c_void) -> i32,
    get_attribute: unsafe extern "C" fn(Raw, i32, i32, i64, *mut i64, *mut c_void) -> i32,
    finalize: unsafe extern "C" fn(Raw) -> i32,
    execute: unsafe extern "C" fn(Raw, Raw, Raw) -> i32,
}

/// Why the library does not compute something.
enum Refusal {
    /// It cannot: another way is taken.
    Unsupported(String),
    /// It should have.
    Failed(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Unsupported(why) | Self::Failed(why)) = self;
        f.write_str(why)
    }
}

impl Library {
    /// The library, opened once for the process.
    fn get() -> std::result::Result<&'static Self, &'static str> {
        static LIBRARY: OnceLock<std::result::Result<Library, String>> = OnceLock::new();
        LIBRARY.get_or_init(Self::open).as_ref().map_err(String::as_str)
    }

    fn open() -> std::result::Result<Self, String> {
        let given = std::env::var(PATH).ok();
        let names = given.as_deref().map_or(NAMES.to_vec(), |path| vec![path]);
        let mut why = String::new();
        for name in names {
            // SAFETY: the library's own start-up code, which does nothing to this process but that.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Self::of(library).map_err(|e| format!("{name}: {e}")),
                Err(error) if why.is_empty() => why = error.to_string(),
                Err(_) => {}
            }
        }
        Err(why)
    }

    fn of(library: libloading::Library) -> std::result::Result<Self, String> {
        /// The function of this name, by the type that is wanted.
        fn get<T: Copy>(
            library: &libloading::Library,
            name: &str,
        ) -> std::result::Result<T, String> {
            // SAFETY: callers want the types that the library's headers declare.
            unsafe { library.get::<T>(name) }.map(|symbol| *symbol).map_err(|e| e.to_string())
        }
        let functions = Self {
            version: get(&library, "cudnnGetVersion")?,
            last_error: get(&library, "cudnnGetLastErrorString")?,
            create: get(&library, "cudnnCreate")?,
            set_stream: get(&library, "cudnnSetStream")?,
            create_descriptor: get(&library, "cudnnBackendCreateDescriptor")?,
            destroy_descriptor: get(&library, "cudnnBackendDestroyDescriptor")?,
            set_attribute: get(&library, "cudnnBackendSetAttribute")?,
            get_attribute: get(&library, "cudnnBackendGetAttribute")?,
            finalize: get(&library, "cudnnBackendFinalize")?,
            execute: get(&library, "cudnnBackendExecute")?,
        };
        // SAFETY: it takes nothing.
        let version = unsafe { (functions.version)() };
        if version < OLDEST {
            return Err(format!("version {version}, attention needs {OLDEST}"));
        }
        // The functions are used for the life of the process.
        std::mem::forget(library);
        Ok(functions)
    }

    fn held(&self, status: i32, doing: &str) -> std::result::Result<(), Refusal> {
        if status == 0 {
            return Ok(());
        }
        let mut text = [0 as c_char; 512];
        // SAFETY: the text has as many bytes as are told.
        unsafe { (self.last_error)(text.as_mut_ptr(), text.len()) };
        text[text.len() - 1] = 0;
        // SAFETY: it ends with a zero.
        let text = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy();
        let text = format!("cuDNN, {doing}: status {status} {}", text.trim());
        // 2000 and up: what was asked for is wrong; 3000 and up: it is not supported.
        match status {
            2000..4000 => Err(Refusal::Unsupported(text)),
            _ => Err(Refusal::Failed(text)),
        }
    }
}

/// A descriptor of the library's.
struct Descriptor {
    library: &'static Library,
    raw: Raw,
}

impl Descriptor {
    fn new(library: &'static Library, what: i32) -> std::result::Result<Self, Refusal> {
        let mut raw = ptr::null_mut();
        // SAFETY: the place is one for a pointer.
        let status = unsafe { (library.create_descriptor)(what, &mut raw) };
        library.held(status, "descriptor")?;
        Ok(Self { library, raw })
    }

    /// Sets an attribute whose values are `T`, as attributes of `kind` are.
    fn set<T>(&self, name: i32, kind: i32, values: &[T]) -> std::result::Result<(), Refusal> {
        let values = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: the library reads that many values of the type that attributes of this kind have.
        let status =
            unsafe { (self.library.set_attribute)(self.raw, name, kind, values.0, values.1) };
        self.library.held(status, &format!("attribute {name}"))
    }

    /// Sets an attribute to other descriptors, which must outlive this one's use.
    fn refer(&self, name: i32, to: &[&Descriptor]) -> std::result::Result<(), Refusal> {
        let raw: Vec<Raw> = to.iter().map(|d| d.raw).collect();
        self.set(name, kind::DESCRIPTOR, &raw)
    }

    fn finalized(self, what: &str) -> std::result::Result<Self, Refusal> {
        // SAFETY: a descriptor that the library made.
        let status = unsafe { (self.library.finalize)(self.raw) };
        self.library.held(status, what)?;
        Ok(self)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: a descriptor that the library made, and nobody uses again.
        unsafe { (self.library.destroy_descriptor)(self.raw) };
    }
}

/// How one shape is computed.
struct Plan {
    plan: Descriptor,
    /// Bytes.
    workspace: u64,
    /// What the plan was made of.
    _graph: Vec<Descriptor>,
}

/// A shape that is computed: dtype, then `[batch, heads, tokens, dim]` and strides of each operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    dtype: DType,
    /// Queries, keys, values, result.
    operands: [([i64; 4], [i64; 4]); 4],
}

/// The library's handle on a GPU, and the plans that were made there, `None` where it has none.
struct Engine {
    library: &'static Library,
    handle: Raw,
    plans: HashMap<Shape, Option<Plan>>,
}

// SAFETY: handle and descriptors may be used by any thread, one at a time: engines are used under a lock.
unsafe impl Send for Engine {}

/// Engines by the address of their CUDA context, each made at the first use.
fn engines() -> &'static Mutex<HashMap<usize, Engine>> {
    static ENGINES: OnceLock<Mutex<HashMap<usize, Engine>>> = OnceLock::new();
    ENGINES.get_or_init(Mutex::default)
}

impl Engine {
    fn new(library: &'static Library) -> std::result::Result<Self, Refusal> {
        let mut handle = ptr::null_mut();
        // SAFETY: the place is one for a pointer; the caller made the context current.
        library.held(unsafe { (library.create)(&mut handle) }, "handle")?;
        Ok(Self { library, handle, plans: HashMap::new() })
    }

    fn plan(&mut self, shape: Shape) -> std::result::Result<Option<&Plan>, Refusal> {
        let made = match self.plans.entry(shape) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => match Plan::new(self.library, self.handle, &shape) {
                Ok(plan) => place.insert(Some(plan)),
                Err(Refusal::Unsupported(why)) => {
                    tracing::info!("attention of {shape:?} is computed in chunks: {why}");
                    place.insert(None)
                }
                Err(failed) => return Err(failed),
            },
        };
        Ok(made.as_ref())
    }
}

impl Plan {
    fn new(
        library: &'static Library,
        handle: Raw,
        shape: &Shape,
    ) -> std::result::Result<Self, Refusal> {
        use self::attribute as a;
        let tensor = |id: usize, dtype: i32, (dims, strides): ([i64; 4], [i64; 4])| {
            let tensor = Descriptor::new(library, of::TENSOR)?;
            tensor.set(a::TENSOR_TYPE, kind::DATA_TYPE, &[dtype])?;
            tensor.set(a::TENSOR_DIMS, kind::INT64, &dims)?;
            tensor.set(a::TENSOR_STRIDES, kind::INT64, &strides)?;
            tensor.set(a::TENSOR_ID, kind::INT64, &[IDS[id]])?;
            tensor.set(a::TENSOR_ALIGNMENT, kind::INT64, &[VECTOR as i64])?;
            if id == SCALE {
                tensor.set(a::TENSOR_BY_VALUE, kind::BOOLEAN, &[1u8])?;
            }
            tensor.finalized("tensor")
        };
        let dtype = if shape.dtype == DType::F16 { 2 } else { 9 };
        let [q, k, v, o] = shape.operands;
        let (q, k, v, o) = (
            tensor(0, dtype, q)?,
            tensor(1, dtype, k)?,
            tensor(2, dtype, v)?,
            tensor(3, dtype, o)?,
        );
        let scale = tensor(SCALE, 0, ([1; 4], [1; 4]))?;
        let operation = Descriptor::new(library, of::ATTENTION)?;
        for (name, tensor) in [
            (a::ATTENTION_Q, &q),
            (a::ATTENTION_K, &k),
            (a::ATTENTION_V, &v),
            (a::ATTENTION_O, &o),
            (a::ATTENTION_SCALE, &scale),
        ] {
            operation.refer(name, &[tensor])?;
        }
        let operation = operation.finalized("attention")?;
        let graph = Descriptor::new(library, of::GRAPH)?;
        graph.set(a::GRAPH_HANDLE, kind::HANDLE, &[handle])?;
        graph.refer(a::GRAPH_OPERATIONS, &[&operation])?;
        let graph = graph.finalized("graph")?;

        let heuristics = Descriptor::new(library, of::HEURISTICS)?;
        heuristics.refer(a::HEURISTICS_GRAPH, &[&graph])?;
        // Mode A, which knows shapes best.
        heuristics.set(a::HEURISTICS_MODE, kind::HEURISTIC, &[3i32])?;
        let heuristics = heuristics.finalized("heuristics")?;
        let engines = (0..16)
            .map(|_| Descriptor::new(library, of::ENGINE))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let mut raw: Vec<Raw> = engines.iter().map(|engine| engine.raw).collect();
        let mut found = 0i64;
        // SAFETY: there is room for as many descriptors as are asked for.
        let status = unsafe {
            (library.get_attribute)(
                heuristics.raw,
                a::HEURISTICS_RESULTS,
                kind::DESCRIPTOR,
                raw.len() as i64,
                &mut found,
                raw.as_mut_ptr().cast(),
            )
        };
        library.held(status, "heuristics")?;
        // The best comes first.
        let mut refusal = Refusal::Unsupported("cuDNN has no engine for it".into());
        for engine in engines.into_iter().take(found.max(0) as usize) {
            let plan = Descriptor::new(library, of::PLAN)?;
            plan.set(a::PLAN_HANDLE, kind::HANDLE, &[handle])?;
            plan.refer(a::PLAN_ENGINE, &[&engine])?;
            let plan = match plan.finalized("plan") {
                Ok(plan) => plan,
                Err(why @ Refusal::Unsupported(_)) => {
                    refusal = why;
                    continue;
                }
                Err(failed) => return Err(failed),
            };
            let (mut workspace, mut count) = (0i64, 0i64);
            // SAFETY: one number is asked for, and there is room for it.
            let status = unsafe {
                (library.get_attribute)(
                    plan.raw,
                    a::PLAN_WORKSPACE,
                    kind::INT64,
                    1,
                    &mut count,
                    (&raw mut workspace).cast(),
                )
            };
            library.held(status, "workspace")?;
            let graph = vec![engine, heuristics, graph, operation, q, k, v, o, scale];
            return Ok(Self { plan, workspace: workspace.max(0) as u64, _graph: graph });
        }
        Err(refusal)
    }

    /// Queues it. Addresses are those of queries, keys, values and the result.
    ///
    /// # Safety
    /// They are where the plan's shape says, and stay until what is queued is over.
    unsafe fn execute(
        &self,
        handle: Raw,
        addresses: [u64; 4],
        scale: f32,
        workspace: u64,
    ) -> std::result::Result<(), Refusal> {
        use self::attribute as a;
        let library = self.plan.library;
        let [q, k, v, o] = addresses.map(|address| address as Raw);
        let pack = Descriptor::new(library, of::VARIANT)?;
        pack.set(a::VARIANT_IDS, kind::INT64, &IDS)?;
        let pointers = [q, k, v, o, (&raw const scale).cast_mut().cast()];
        pack.set(a::VARIANT_POINTERS, kind::POINTER, &pointers)?;
        pack.set(a::VARIANT_WORKSPACE, kind::POINTER, &[workspace as Raw])?;
        let pack = pack.finalized("variant")?;
        // SAFETY: handle, plan and pack belong together; the scale is read before this returns.
        let status = unsafe { (library.execute)(handle, self.plan.raw, pack.raw) };
        library.held(status, "attention")
    }
}

/// The numbers that operands have within a graph: queries, keys, values, result, scale.
const IDS: [i64; 5] = [1, 2, 3, 4, 5];
/// The place of the scale among them.
const SCALE: usize = 4;

/// The version of the library that is used; why none is.
pub(super) fn version() -> std::result::Result<usize, &'static str> {
    // SAFETY: it takes nothing.
    Library::get().map(|library| unsafe { (library.version)() })
}

/// softmax(q · kᵀ · scale) · v with the heads merged, as [`attention`](crate::nn::attention) has it without
/// biases; `None` for what the library does not compute.
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    match q.dtype() {
        DType::BF16 => attend::<bf16>(q, k, v, scale),
        DType::F16 => attend::<f16>(q, k, v, scale),
        _ => Ok(None),
    }
}

fn attend<T: Element>(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let (Ok(library), Device::Cuda(device)) = (Library::get(), q.device()) else {
        return Ok(None);
    };
    let (batch, heads, queries, dim) = q.dims4()?;
    let (_, groups, keys, _) = k.dims4()?;
    let fits = k.dims() == v.dims() && k.dim(0)? == batch && k.dim(3)? == dim;
    let whole = dim.is_multiple_of(VECTOR / size_of::<T>()) && dim <= WIDEST;
    if !fits || groups != heads || !whole || q.elem_count() == 0 || keys == 0 {
        return Ok(None);
    }
    let (q, k, v) = (vectors::<T>(q)?, vectors::<T>(k)?, vectors::<T>(v)?);
    let inputs = [Some(&q), Some(&k), Some(&v)];
    held_to::<T>(&inputs)?;
    let mut out = Fresh::<T>::new(&q, (batch * queries * heads * dim) as u64)?;
    let [b, h, s, d] = [batch, heads, queries, dim].map(|n| n as i64);
    let merged = ([b, h, s, d], [s * h * d, d, h * d, 1]);
    let shape = Shape { dtype: T::DTYPE, operands: [lies(&q), lies(&k), lies(&v), merged] };

    let mut engines = engines().lock();
    let done = out.queue(&inputs, |stream, inputs, out| {
        stream.context().bind_to_thread().w()?;
        let failed = |refusal: Refusal| candle_core::Error::msg(refusal);
        let engine = match engines.entry(stream.context().cu_ctx() as usize) {
            Entry::Occupied(engine) => engine.into_mut(),
            Entry::Vacant(place) => place.insert(Engine::new(library).map_err(failed)?),
        };
        let handle = engine.handle;
        let Some(plan) = engine.plan(shape).map_err(failed)? else {
            return Ok(false);
        };
        // SAFETY: candle's stream, of the context that the handle was made in.
        let status = unsafe { (library.set_stream)(handle, stream.cu_stream().cast()) };
        library.held(status, "stream").map_err(failed)?;
        let workspace = Scratch::new(device, plan.workspace.div_ceil(4).max(1))?;
        let &[q, k, v] = inputs else { bail!("attention: operands without addresses") };
        // SAFETY: the operands lie as `shape` says, locked and held to the memory that they have; the workspace
        // goes back behind what is queued here.
        unsafe { plan.execute(handle, [q, k, v, out], scale as f32, workspace.address(device)) }
            .map_err(failed)?;
        Ok(true)
    })?;
    Ok(done.then(|| out.tensor((batch, queries, heads * dim))))
}

/// `t` where its rows are vectors that begin where vectors may: as it is, or a copy.
fn vectors<T: Element>(t: &Tensor) -> Result<Tensor> {
    let each = VECTOR / size_of::<T>();
    let strides = t.stride();
    let apart = t.dims().iter().zip(strides).take(3);
    let regular = strides[3] == 1
        && t.layout().start_offset().is_multiple_of(each)
        && apart.clone().all(|(&n, stride)| n == 1 || (*stride > 0 && stride.is_multiple_of(each)));
    if regular { Ok(t.clone()) } else { t.force_contiguous() }
}

/// The dimensions and strides of four dimensions.
fn lies(t: &Tensor) -> ([i64; 4], [i64; 4]) {
    let (mut dims, mut strides) = ([0; 4], [0; 4]);
    for (at, (&n, &stride)) in t.dims().iter().zip(t.stride()).enumerate().take(4) {
        (dims[at], strides[at]) = (n as i64, stride as i64);
    }
    (dims, strides)
}
