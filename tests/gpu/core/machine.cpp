// Runs a grid: blocks in random order, the warps of a block interleaved at random; and the C
// interface.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <sstream>

Warp::Warp(Block& block, Program& program, int id, Mask live)
    : block(block),
      program(program),
      live(live),
      fragments{{0, live, {}}},
      registers(program.register_bytes, 0xcd),
      local(size_t(32) * program.local_bytes, 0xcd) {
  observer.id = id;
  if (program.uses_wgmma)
    held.resize(program.register_bytes / 64), stale.resize(program.register_bytes / 64);
  for (const auto& [offset, data] : program.constants)
    std::copy(data.begin(), data.end(), registers.begin() + offset);
  auto set = [&](const std::string& name, auto value) {
    for (int lane = 0; lane < 32; ++lane)
      at<uint32_t>(program.specials.at(name))[lane] = value(lane);
  };
  auto thread = [=](int lane) { return uint32_t(32 * id + lane); };
  const uint32_t* size = block.size;
  const char axes[] = "xyz";
  for (int i = 0; i < 3; ++i) {
    const std::string axis(1, axes[i]);
    uint32_t inner = i == 0 ? 1 : i == 1 ? size[0] : size[0] * size[1];
    set("%tid." + axis, [&](int l) { return thread(l) / inner % size[i]; });
    set("%ntid." + axis, [&](int) { return size[i]; });
    set("%ctaid." + axis, [&](int) { return block.index[i]; });
    set("%nctaid." + axis, [&](int) { return block.grid[i]; });
  }
  set("%laneid", [](int l) { return l; });
  set("%warpid", [=](int) { return id; });
  set("%nwarpid", [&](int) { return (size[0] * size[1] * size[2] + 31) / 32; });
  set("%smid", [&](int) { return uint32_t(block.linear % 4); });
  set("%nsmid", [](int) { return 4; });
  set("%lanemask_eq", [](int l) { return 1u << l; });
  set("%lanemask_lt", [](int l) { return (1u << l) - 1; });
  set("%lanemask_le", [](int l) { return (2u << l) - 1; });
  set("%lanemask_gt", [](int l) { return ~((2u << l) - 1); });
  set("%lanemask_ge", [](int l) { return ~((1u << l) - 1); });
  set("%dynamic_smem_size",
      [&](int) { return uint32_t(block.shared.size() - program.static_shared); });
  set("%total_smem_size", [&](int) { return uint32_t(block.shared.size()); });
  for (const char* name : {"%cluster_ctarank", "%cluster_ctaid.x", "%clusterid.x", "%gridid"})
    set(name, [](int) { return 0; });
  for (const char* name : {"%cluster_nctarank", "%nclusterid.x"}) set(name, [](int) { return 1; });
}

// Registers of a wgmma in flight must not be touched, and those written since wgmma.fence not be
// given to one. Plain copies are renamings, which compilers place anywhere: the copy of a held
// register is held too, that of a fenced one is fenced.
void Warp::check_held(const Instruction& instruction) {
  if (instruction.opcode.compare(0, 5, "wgmma") == 0) return;
  auto slot = [](Register r) { return r.offset / 64; };
  const bool copies = instruction.opcode.compare(0, 3, "mov") == 0 &&
                      instruction.reads.size() <= 1 && instruction.writes.size() == 1;
  if (copies && !instruction.reads.empty() && held[slot(instruction.reads[0])]) {
    const Register from = instruction.reads[0], to = instruction.writes[0];
    for (auto& group : multiplications) {
      for (Multiplication& x : group) {
        auto same = [&](Register r) { return r.offset == from.offset; };
        if (std::none_of(x.registers.begin(), x.registers.end(), same)) continue;
        x.registers.push_back(to);
        ++held[slot(to)];
      }
    }
    return;
  }
  bool fresh = copies;
  for (const auto* list : {&instruction.reads, &instruction.writes}) {
    for (Register r : *list) {
      if (held[slot(r)])
        throw Fault("wgmma", "a register of a wgmma in flight is used before wgmma.wait_group");
    }
  }
  for (Register r : instruction.reads) fresh &= !stale[slot(r)];
  for (Register r : instruction.writes) stale[slot(r)] = !fresh;
}

// Of the fragments the one in the deepest call and with the lowest program counter runs, so that
// branches meet again; but at a barrier, an exchange and the end lanes wait for those that may
// still come.
void Warp::step() {
  if (fragments.size() > 1) {
    auto moves = std::find_if(fragments.begin(), fragments.end(),
                              [this](const Fragment& f) { return !program.code[f.pc].gathers; });
    if (moves != fragments.end()) std::rotate(fragments.begin(), moves, moves + 1);
  }
  Fragment& here = fragments.front();
  Instruction& instruction = program.code[here.pc];
  block.current = &instruction;
  Mask mask = here.mask;
  ++here.pc;
  ++instruction.executed;
  if (instruction.guard) {
    Mask p = predicate(*instruction.guard);
    mask &= instruction.guard_negated ? ~p : p;
  }
  if (mask) {
    if (program.uses_wgmma) check_held(instruction);
    instruction.run(*this, mask);
  }
  if (fragments.size() > 1) {
    std::stable_sort(fragments.begin(), fragments.end(), [](const Fragment& a, const Fragment& b) {
      return a.stack.size() != b.stack.size() ? a.stack.size() > b.stack.size()
                                              : a.pc < b.pc;  // callees lie behind their callers
    });
    for (size_t i = 1; i < fragments.size();) {
      Fragment &a = fragments[i - 1], &b = fragments[i];
      if (a.pc == b.pc && a.stack == b.stack) {
        a.mask |= b.mask;
        fragments.erase(fragments.begin() + i);
      } else {
        ++i;
      }
    }
  }
}

void Block::run(uint64_t limit) {
  const uint32_t threads = size[0] * size[1] * size[2];
  async.id = async_agent;
  for (uint32_t first = 0; first < threads; first += 32) {
    uint32_t n = std::min(32u, threads - first);
    warps.push_back(
        std::make_unique<Warp>(*this, program, first / 32, n == 32 ? ~0u : (1u << n) - 1));
  }
  std::vector<Warp*> ready;
  for (;;) {
    ready.clear();
    size_t waiting = 0;
    for (auto& w : warps) {
      if (w->waiting)
        ++waiting;
      else if (!w->fragments.empty())
        ready.push_back(w.get());
    }
    if (ready.empty() && !waiting) break;
    if (!bulk.empty() && (ready.empty() || random() % 8 == 0)) {
      land(random() % bulk.size());
      continue;
    }
    if (ready.empty()) {
      current = &program.code[warps[0]->fragments.empty() ? 0 : warps[0]->fragments[0].pc];
      for (auto& w : warps) {
        if (w->waiting) current = &program.code[w->fragments[0].pc - 1];
      }
      throw Fault("deadlock", std::to_string(waiting) + " of " + std::to_string(warps.size()) +
                                  " warps wait at a barrier that the others never reach");
    }
    Warp& warp = *ready[random() % ready.size()];
    for (uint64_t burst = 1ull << random() % 9; burst && !warp.waiting && !warp.fragments.empty();
         --burst) {
      try {
        warp.step();
      } catch (Fault& fault) {
        std::ostringstream where;
        where << fault.what() << "\n  in block (" << index[0] << ", " << index[1] << ", "
              << index[2] << "), warp " << warp.observer.id;
        if (fault.lane >= 0) where << ", thread " << 32 * warp.observer.id + fault.lane;
        throw Fault(fault.kind, where.str(), fault.lane);
      }
      if (++steps > limit)
        throw Fault("deadlock", "no end after " + std::to_string(limit) + " instructions");
      if (idle > 200000 && bulk.empty())
        throw Fault("deadlock", "every warp polls an mbarrier that never completes");
    }
  }
  if (!barriers.empty()) {
    for (auto& [id, b] : barriers) {
      if (b.arrived)
        throw Fault("deadlock", "the block ended with " + std::to_string(b.arrived) +
                                    " arrivals pending at barrier " + std::to_string(id));
    }
  }
}

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\')
      out += '\\', out += c;
    else if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) < 32)
      out += ' ';
    else
      out += c;
  }
  return out + "\"";
}

std::string place(const Module& module, const Instruction* instruction) {
  if (!instruction) return "";
  std::string out = "\n  at  " + instruction->text;
  auto file = module.files.find(instruction->file);
  if (instruction->line) {
    out += "\n  line " + std::to_string(instruction->line);
    if (file != module.files.end()) out += " of " + file->second;
  }
  return out;
}

std::string fault_json(const Fault& fault, const std::string& extra = "") {
  return "{\"fault\": " + quoted(fault.kind) + ", \"message\": " + quoted(fault.what() + extra) +
         "}";
}

std::string report(const Module& module, const Program& program) {
  std::ostringstream out;
  std::map<std::string, uint64_t> counts;
  uint64_t wavefronts = 0, ideal = 0;
  std::string conflicts;
  for (const Instruction& i : program.code) {
    if (i.executed) counts[i.opcode] += i.executed;
    wavefronts += i.wavefronts;
    ideal += i.ideal_wavefronts;
    if (i.wavefronts <= i.ideal_wavefronts) continue;
    auto file = module.files.find(i.file);
    conflicts += (conflicts.empty() ? "[" : ", [") +
                 quoted(file == module.files.end() ? "" : file->second) + ", " +
                 std::to_string(i.line) + ", " + quoted(i.text) + ", " +
                 std::to_string(i.wavefronts) + ", " + std::to_string(i.ideal_wavefronts) + "]";
  }
  out << "{\"wavefronts\": " << wavefronts << ", \"ideal_wavefronts\": " << ideal
      << ", \"conflicts\": [" << conflicts << "], \"instructions\": {";
  const char* separator = "";
  for (const auto& [opcode, n] : counts)
    out << separator << quoted(opcode) << ": " << n, separator = ", ";
  out << "}, \"traffic\": [";
  separator = "";
  for (const auto& [base, a] : Heap::instance().allocations()) {
    const Traffic& t = a.traffic;
    if (!t.read && !t.written) continue;
    out << separator << "[" << base << ", " << a.size;
    for (uint64_t v :
         {t.read, t.written, t.read_sectors, t.written_sectors, t.read_unique, t.written_unique,
          t.read_lines, t.written_lines, t.partial_read_lines, t.partial_written_lines}) {
      out << ", " << v;
    }
    out << "]";
    separator = ", ";
  }
  out << "]}";
  return out.str();
}

const Function& find_kernel(const Module& module, const char* name) {
  auto found = module.functions.find(name);
  if (found == module.functions.end() || !found->second.entry)
    throw Fault("launch", std::string("no kernel named ") + name);
  return found->second;
}

Program& compiled(Module& module, const char* name) {
  std::unique_ptr<Program>& program = module.programs[name];
  if (!program) program = std::make_unique<Program>(module, find_kernel(module, name));
  return *program;
}

std::string launch(Module& module, const char* name, const uint32_t* grid, const uint32_t* size,
                   uint32_t dynamic_shared, const void* const* arguments, uint64_t seed,
                   uint64_t limit) {
  const Function& entry = find_kernel(module, name);
  Program& program = compiled(module, name);
  const uint32_t threads = size[0] * size[1] * size[2];
  if (threads == 0 || threads > entry.max_threads ||
      (entry.required_threads && threads != entry.required_threads)) {
    throw Fault("launch",
                std::string(name) + " launched with " + std::to_string(threads) + " threads");
  }
  std::vector<uint8_t> params(program.param_bytes + 16);
  uint64_t at = 0;
  for (size_t i = 0; i < entry.parameters.size(); ++i) {
    const Variable& p = entry.parameters[i];
    at = (at + p.align - 1) / p.align * p.align;
    std::memcpy(params.data() + at, arguments[i], p.bytes);
    at += p.bytes;
  }
  for (Instruction& i : program.code) i.executed = i.wavefronts = i.ideal_wavefronts = 0;
  const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  Heap& heap = Heap::instance();
  heap.begin_launch(blocks);
  std::mt19937_64 random(seed);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  uint64_t steps = 0;
  for (uint64_t b : order) {
    heap.begin_block(b);
    Block block{
        program,
        {grid[0], grid[1], grid[2]},
        {size[0], size[1], size[2]},
        {uint32_t(b % grid[0]), uint32_t(b / grid[0] % grid[1]), uint32_t(b / grid[0] / grid[1])},
        b,
        Shared(program.static_shared + dynamic_shared),
        params,
        {},
        {},
        {},
        {},
        {},
        random};
    try {
      block.run(limit - steps);
    } catch (const Fault& fault) {
      throw Fault(fault.kind,
                  std::string(name) + ": " + fault.what() + place(module, block.current));
    }
    steps += block.steps;
  }
  return report(module, program);
}

std::string answer;

}  // namespace

extern "C" {

Module* ptx_load(const char* text, const char** failure) {
  try {
    return new Module(text);
  } catch (const std::exception& e) {
    answer = e.what();
    *failure = answer.c_str();
    return nullptr;
  }
}

void ptx_free(Module* module) { delete module; }

const char* ptx_launch(Module* module, const char* name, const uint32_t* grid, const uint32_t* size,
                       uint32_t dynamic_shared, const void* const* arguments, uint64_t seed,
                       uint64_t limit) {
  try {
    answer = launch(*module, name, grid, size, dynamic_shared, arguments, seed, limit);
  } catch (const Fault& fault) {
    answer = fault_json(fault);
  }
  return answer.c_str();
}

// Compiles a kernel without running it: "" or what is wrong.
const char* ptx_compile(Module* module, const char* name) {
  answer.clear();
  try {
    compiled(*module, name);
  } catch (const Fault& fault) {
    answer = fault.what();
  }
  return answer.c_str();
}

// "name:bytes of each parameter,": a line for each kernel.
const char* ptx_describe(Module* module) {
  answer.clear();
  for (const auto& [name, f] : module->functions) {
    if (!f.entry) continue;
    answer += name + ":";
    for (const Variable& p : f.parameters) answer += std::to_string(p.bytes) + ",";
    answer += "\n";
  }
  return answer.c_str();
}

void heap_add(uint64_t base, uint64_t size) { Heap::instance().add(base, size, true); }
int heap_known(uint64_t base) { return Heap::instance().allocations().count(base) != 0; }
void heap_remove(uint64_t base) { Heap::instance().remove(base); }
}
