// Which CUDA this library was compiled with. finecf/_native.py reads the marked text from the file before it loads the
// library, so that a library of another CUDA major version never registers a kernel.

namespace {
__attribute__((used)) const char marked[] = "finecf_cuda_version=" FINECF_CUDA_VERSION;
}

extern "C" __attribute__((visibility("default"))) const char* finecf_cuda_version() {
  return marked + sizeof("finecf_cuda_version=") - 1;
}
