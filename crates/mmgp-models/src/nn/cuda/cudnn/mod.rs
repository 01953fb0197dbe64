//! NVIDIA's [cuDNN](https://docs.nvidia.com/deeplearning/cudnn/backend/latest/), where it is installed.
//!
//! The library is opened when it is first asked for, so that programs start without it, and asked by its backend
//! interface, whose numbers stand here as its headers have them: a graph of one operation is described, the
//! library offers engines for it, the best first, and makes a plan of one.
//!
//! A plan takes up to 0.1 s, and again from nothing when it is asked for again, so plans are kept for the life of
//! the process, by all that they depend on.

mod attention;
mod convolution;

use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, c_char, c_void},
    fmt, ptr,
    sync::{Arc, OnceLock},
};

use candle_core::{
    CudaDevice, DType, Result,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaContext, CudaStream},
    },
};
use parking_lot::Mutex;

use super::launch::Scratch;

pub(super) use self::{
    attention::{Rows, attends_within, attention, attention_within},
    convolution::Convolution,
};

/// The names that the library has, first those that are tried first.
const NAMES: [&str; 3] = ["libcudnn.so.9", "libcudnn.so", "cudnn64_9.dll"];
/// The path of the library where the loader does not find it.
const PATH: &str = "MMGP_CUDNN";
/// 9.13.1, the first version that has attention as one operation.
const OLDEST: usize = 91_301;
/// The bytes of a vector, at which operands begin.
const VECTOR: usize = 16;
/// Engines that want more memory beside the operands are not taken.
const WORKSPACE: u64 = 64 << 20;

type Raw = *mut c_void;

/// The types of attributes.
mod kind {
    pub(super) const HANDLE: i32 = 0;
    pub(super) const DATA_TYPE: i32 = 1;
    pub(super) const BOOLEAN: i32 = 2;
    pub(super) const INT64: i32 = 3;
    pub(super) const FLOAT: i32 = 4;
    pub(super) const POINTER: i32 = 6;
    pub(super) const CONVOLUTION_MODE: i32 = 7;
    pub(super) const HEURISTIC: i32 = 8;
    pub(super) const DESCRIPTOR: i32 = 15;
}

/// What descriptors describe.
mod of {
    pub(super) const CONVOLUTION: i32 = 1;
    pub(super) const ENGINE: i32 = 3;
    pub(super) const HEURISTICS: i32 = 4;
    pub(super) const PLAN: i32 = 5;
    pub(super) const CONVOLVE: i32 = 10;
    pub(super) const GRAPH: i32 = 15;
    pub(super) const VARIANT: i32 = 16;
    pub(super) const TENSOR: i32 = 17;
    pub(super) const ATTENTION: i32 = 41;
}

/// The attributes of descriptors.
mod attribute {
    pub(super) const CONVOLUTION_DTYPE: i32 = 100;
    pub(super) const CONVOLUTION_MODE: i32 = 101;
    pub(super) const CONVOLUTION_DILATIONS: i32 = 102;
    pub(super) const CONVOLUTION_STRIDES: i32 = 103;
    pub(super) const CONVOLUTION_BEHIND: i32 = 104;
    pub(super) const CONVOLUTION_BEFORE: i32 = 105;
    pub(super) const CONVOLUTION_DIMS: i32 = 106;
    pub(super) const HEURISTICS_MODE: i32 = 200;
    pub(super) const HEURISTICS_GRAPH: i32 = 201;
    pub(super) const HEURISTICS_RESULTS: i32 = 202;
    pub(super) const PLAN_HANDLE: i32 = 400;
    pub(super) const PLAN_ENGINE: i32 = 401;
    pub(super) const PLAN_WORKSPACE: i32 = 402;
    pub(super) const CONVOLVE_ALPHA: i32 = 700;
    pub(super) const CONVOLVE_BETA: i32 = 701;
    pub(super) const CONVOLVE_HOW: i32 = 702;
    pub(super) const CONVOLVE_W: i32 = 703;
    pub(super) const CONVOLVE_X: i32 = 704;
    pub(super) const CONVOLVE_Y: i32 = 705;
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

/// What the library answers.
type Answer<T> = std::result::Result<T, Refusal>;

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

    fn held(&self, status: i32, doing: &str) -> Answer<()> {
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
    fn new(library: &'static Library, what: i32) -> Answer<Self> {
        let mut raw = ptr::null_mut();
        // SAFETY: the place is one for a pointer.
        let status = unsafe { (library.create_descriptor)(what, &mut raw) };
        library.held(status, "descriptor")?;
        Ok(Self { library, raw })
    }

    /// Sets an attribute whose values are `T`, as attributes of `kind` are.
    fn set<T>(&self, name: i32, kind: i32, values: &[T]) -> Answer<()> {
        let values = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: the library reads that many values of the type that attributes of this kind have.
        let status =
            unsafe { (self.library.set_attribute)(self.raw, name, kind, values.0, values.1) };
        self.library.held(status, &format!("attribute {name}"))
    }

    /// Sets an attribute to other descriptors, which must outlive this one's use.
    fn refer(&self, name: i32, to: &[&Descriptor]) -> Answer<()> {
        let raw: Vec<Raw> = to.iter().map(|d| d.raw).collect();
        self.set(name, kind::DESCRIPTOR, &raw)
    }

    fn finalized(self, what: &str) -> Answer<Self> {
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

/// An operand in memory: its dimensions in the library's order, and how many values each goes on by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Lies {
    dims: [i64; 4],
    strides: [i64; 4],
}

/// What the library calls a dtype.
fn number_of(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 2,
        _ => 9, // bf16
    }
}

impl Lies {
    /// The operand that is called `id` in its graph.
    fn described(self, library: &'static Library, id: i64, dtype: DType) -> Answer<Descriptor> {
        self.tensor(library, id, dtype)?.finalized("tensor")
    }

    fn tensor(self, library: &'static Library, id: i64, dtype: DType) -> Answer<Descriptor> {
        let tensor = Descriptor::new(library, of::TENSOR)?;
        tensor.set(attribute::TENSOR_TYPE, kind::DATA_TYPE, &[number_of(dtype)])?;
        tensor.set(attribute::TENSOR_DIMS, kind::INT64, &self.dims)?;
        tensor.set(attribute::TENSOR_STRIDES, kind::INT64, &self.strides)?;
        tensor.set(attribute::TENSOR_ID, kind::INT64, &[id])?;
        tensor.set(attribute::TENSOR_ALIGNMENT, kind::INT64, &[VECTOR as i64])?;
        Ok(tensor)
    }
}

/// All that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(clippy::large_enum_variant)] // few are kept, and none is boxed at each call
enum Key {
    Attention(attention::Attention),
    Convolution(Convolution),
}

impl Key {
    /// The operation, and what it refers to, which must live as long. Operands are called 1, 2 and so on, in the
    /// order in which their addresses are given.
    fn described(&self, library: &'static Library) -> Answer<(Descriptor, Vec<Descriptor>)> {
        match self {
            Self::Attention(attention) => attention.described(library),
            Self::Convolution(convolution) => convolution.described(library),
        }
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

/// The library's handle on a GPU, and the plans that were made there, `None` where it has none.
struct Engine {
    library: &'static Library,
    handle: Raw,
    plans: HashMap<Key, Option<Plan>>,
    _context: Arc<CudaContext>,
}

// SAFETY: handle and descriptors may be used by any thread, one at a time: engines are used under a lock.
unsafe impl Send for Engine {}

/// Engines by the address of their CUDA context, each made at the first use; each holds its context, so that an
/// address never comes to mean another one.
fn engines() -> &'static Mutex<HashMap<usize, Engine>> {
    static ENGINES: OnceLock<Mutex<HashMap<usize, Engine>>> = OnceLock::new();
    ENGINES.get_or_init(Mutex::default)
}

impl Engine {
    /// One for the context, which is the thread's current one.
    fn new(library: &'static Library, context: &Arc<CudaContext>) -> Answer<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: the place is one for a pointer.
        library.held(unsafe { (library.create)(&mut handle) }, "handle")?;
        Ok(Self { library, handle, plans: HashMap::new(), _context: context.clone() })
    }

    fn plan(&mut self, key: Key) -> Answer<Option<&Plan>> {
        let made = match self.plans.entry(key) {
            Entry::Occupied(made) => made.into_mut(),
            Entry::Vacant(place) => match Plan::new(self.library, self.handle, &key) {
                Ok(plan) => place.insert(Some(plan)),
                Err(Refusal::Unsupported(why)) => {
                    tracing::info!("not by cuDNN: {key:?}: {why}");
                    place.insert(None)
                }
                Err(failed) => return Err(failed),
            },
        };
        Ok(made.as_ref())
    }
}

impl Plan {
    fn new(library: &'static Library, handle: Raw, key: &Key) -> Answer<Self> {
        use self::attribute as a;
        let (operation, parts) = key.described(library)?;
        let graph = Descriptor::new(library, of::GRAPH)?;
        graph.set(a::GRAPH_HANDLE, kind::HANDLE, &[handle])?;
        graph.refer(a::GRAPH_OPERATIONS, &[&operation])?;
        let graph = graph.finalized("graph")?;

        let heuristics = Descriptor::new(library, of::HEURISTICS)?;
        heuristics.refer(a::HEURISTICS_GRAPH, &[&graph])?;
        // Mode A, which knows shapes best.
        heuristics.set(a::HEURISTICS_MODE, kind::HEURISTIC, &[3i32])?;
        let heuristics = heuristics.finalized("heuristics")?;
        let engines: Vec<Descriptor> =
            (0..16).map(|_| Descriptor::new(library, of::ENGINE)).collect::<Answer<_>>()?;
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
        let mut refusal = Refusal::Unsupported("no engine is offered".into());
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
            let workspace = workspace.max(0) as u64;
            if workspace > WORKSPACE {
                refusal = Refusal::Unsupported(format!("it wants {workspace} bytes beside"));
                continue;
            }
            let mut graph = vec![engine, heuristics, graph, operation];
            graph.extend(parts);
            return Ok(Self { plan, workspace, _graph: graph });
        }
        Err(refusal)
    }

    /// Queues it.
    ///
    /// # Safety
    /// `operands` are where the plan's operands lie, in their order, and stay until what is queued is over.
    unsafe fn execute(&self, handle: Raw, operands: &[Raw], workspace: u64) -> Answer<()> {
        use self::attribute as a;
        let library = self.plan.library;
        let pack = Descriptor::new(library, of::VARIANT)?;
        let ids: Vec<i64> = (1..=operands.len() as i64).collect();
        pack.set(a::VARIANT_IDS, kind::INT64, &ids)?;
        pack.set(a::VARIANT_POINTERS, kind::POINTER, operands)?;
        pack.set(a::VARIANT_WORKSPACE, kind::POINTER, &[workspace as Raw])?;
        let pack = pack.finalized("variant")?;
        // SAFETY: handle, plan and pack belong together; the caller vouches for the addresses.
        let status = unsafe { (library.execute)(handle, self.plan.raw, pack.raw) };
        library.held(status, "execution")
    }
}

/// Calls `with` with the engine of the stream's context and its plan for `key`; `None` where there is none.
fn planned<R>(
    stream: &CudaStream,
    key: Key,
    with: impl FnOnce(Raw, &'static Library, &Plan) -> Result<R>,
) -> Result<Option<R>> {
    let Ok(library) = Library::get() else { return Ok(None) };
    let failed = |refusal: Refusal| candle_core::Error::msg(refusal);
    let context = stream.context();
    context.bind_to_thread().w()?;
    let mut engines = engines().lock();
    let engine = match engines.entry(context.cu_ctx() as usize) {
        Entry::Occupied(engine) => engine.into_mut(),
        Entry::Vacant(place) => place.insert(Engine::new(library, context).map_err(failed)?),
    };
    let handle = engine.handle;
    let plan = engine.plan(key).map_err(failed)?;
    plan.map(|plan| with(handle, library, plan)).transpose()
}

/// Whether the library computes `key` on the stream's GPU.
fn offers(stream: &CudaStream, key: Key) -> Result<bool> {
    Ok(planned(stream, key, |_, _, _| Ok(()))?.is_some())
}

/// Queues `key`; `false` where the library does not compute it.
///
/// # Safety
/// `operands` lie as `key` says, in its order, within memory that is theirs and ordered by `stream`, which is
/// `device`'s. What is on the host is read before this returns.
unsafe fn queue(
    device: &CudaDevice,
    stream: &CudaStream,
    key: Key,
    operands: &[Raw],
) -> Result<bool> {
    let done = planned(stream, key, |handle, library, plan| {
        let failed = |refusal: Refusal| candle_core::Error::msg(refusal);
        // SAFETY: candle's stream, of the context that the handle was made in.
        let status = unsafe { (library.set_stream)(handle, stream.cu_stream().cast()) };
        library.held(status, "stream").map_err(failed)?;
        // It goes back behind what is queued here.
        let workspace = Scratch::new(device, plan.workspace.div_ceil(4).max(1))?;
        // SAFETY: handed on to the caller.
        unsafe { plan.execute(handle, operands, workspace.address(device)) }.map_err(failed)
    })?;
    Ok(done.is_some())
}

/// The version of the library that is used; why none is.
pub(super) fn version() -> std::result::Result<usize, &'static str> {
    // SAFETY: it takes nothing.
    Library::get().map(|library| unsafe { (library.version)() })
}
