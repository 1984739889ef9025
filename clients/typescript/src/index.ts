// Clients of the services of one mesh. The messages are in ./gen/esper/<component>/v1.
import { readFileSync } from "node:fs";
import { type Client, Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import type { DescService } from "@bufbuild/protobuf";
import { KasminaService } from "./gen/esper/kasmina/v1/kasmina_service_pb.js";
import { EventService } from "./gen/esper/oona/v1/event_service_pb.js";
import { PolicyService } from "./gen/esper/tamiyo/v1/policy_service_pb.js";
import { CompileService } from "./gen/esper/tezzeret/v1/compile_service_pb.js";
import { TrainingService } from "./gen/esper/tolaria/v1/training_service_pb.js";
import { BlueprintService } from "./gen/esper/urza/v1/blueprint_service_pb.js";

export { Code, ConnectError };

/** `host:port` of each service by its name. */
export type Addresses = Record<string, string>;

/** Reads the addresses.json of a run folder; throws where it cannot be read. */
export function readAddresses(path: string): Addresses {
  return JSON.parse(readFileSync(path, "utf8")) as Addresses;
}

/**
 * The services of a mesh, in plain text as on loopback. Connections are made with the first call.
 * Give every call a `timeoutMs`: there is none by default.
 */
export class Mesh {
  readonly blueprints: Client<typeof BlueprintService>;
  readonly compiler: Client<typeof CompileService>;
  readonly policy: Client<typeof PolicyService>;
  readonly seeds: Client<typeof KasminaService>;
  readonly events: Client<typeof EventService>;
  readonly training: Client<typeof TrainingService>;

  constructor(private readonly addresses: Addresses) {
    this.blueprints = this.client("urza", BlueprintService);
    this.compiler = this.client("tezzeret", CompileService);
    this.policy = this.client("tamiyo", PolicyService);
    this.seeds = this.client("kasmina", KasminaService);
    this.events = this.client("oona", EventService);
    this.training = this.client("tolaria", TrainingService);
  }

  private client<S extends DescService>(name: string, service: S): Client<S> {
    const address = this.addresses[name];
    if (address === undefined) {
      throw new Error(`the mesh has no service "${name}"`);
    }
    return createClient(service, createGrpcTransport({ baseUrl: `http://${address}` }));
  }
}
